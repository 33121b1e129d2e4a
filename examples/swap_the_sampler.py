"""Samplers are swapped as diffusers' schedulers are, and saved with the pipeline."""

import tempfile

import arvision
from arvision.samplers import SJDSampler

pipe = arvision.load("llamagen-fashion")
pipe.sampler = SJDSampler.from_config(pipe.sampler.config, window=32, coupling="maximal")
with tempfile.TemporaryDirectory() as folder:
    pipe.save_pretrained(folder)
    again = arvision.ARPipeline.from_pretrained(folder)
out = again(["dress", "coat"], seed=1, num_images_per_prompt=2)
print(type(again.sampler).__name__, f"{out.stats.tokens_per_pass:.2f} tokens per pass")
