"""Draw a sneaker in a few lines."""

import arvision

out = arvision.sample("llamagen-fashion", "sneaker", sampler="sjd", num_images=4, seed=0)
print(out.stats.forward_passes, "passes instead of", out.stats.tokens - 1)
for number, image in enumerate(out.images):
    image.resize((128, 128)).save(f"sneaker-{number}.png")
