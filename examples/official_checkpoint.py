"""Load the authors' LlamaGen files: python examples/official_checkpoint.py c2i_B_256.pt vq_ds16_c2i.pt."""

import sys

import arvision
from arvision.models import LlamaGen

model = LlamaGen.from_official(sys.argv[1], sys.argv[2])
pipe = arvision.ARPipeline.from_model(model, guidance_scale=4.0, top_k=2000)
pipe([207, 360], seed=0).images[0].save("golden_retriever.png")
