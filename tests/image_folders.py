"""Tiny image models in folders as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_networks as tiny
import torch

from arvision.models import ChameleonDecoder


def janus_folder(folder: Path) -> Any:
    network = tiny.tiny_janus().float()
    network.save_pretrained(folder)
    tiny.janus_processor().save_pretrained(folder)
    return network


def emu3_folder(folder: Path) -> Any:
    network = tiny.tiny_emu3().float()
    network.save_pretrained(folder)
    tiny.emu3_processor().save_pretrained(folder)
    return network


def chameleon_folder(folder: Path, has_decoder: bool = True) -> Any:
    network = tiny.tiny_chameleon().float()
    network.save_pretrained(folder)
    tiny.chameleon_processor().save_pretrained(folder)
    if has_decoder:
        torch.manual_seed(0)
        decoder = ChameleonDecoder(ch=32, ch_mult=(1, 1), num_blocks=1, latent_dim=16)
        torch.save({"state_dict": decoder.state_dict()}, folder / "vqgan.ckpt")
    return network


def glm_folder(folder: Path) -> Any:
    pipe = tiny.tiny_glm_pipeline()
    pipe.vision_language_encoder.float().generation_config.do_sample = True
    pipe.vision_language_encoder.float().generation_config.do_sample = True
    pipe.save_pretrained(folder)
    return pipe
