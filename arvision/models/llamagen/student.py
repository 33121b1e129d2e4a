"""Students of Distilled Decoding for LlamaGen: the network, and the family object around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, shape_of, split_placement
from ...contracts import Conditions
from ...decoding.student import codebook_mark
from ...errors import InputError
from ...kernels.linear import Linear
from ...networks import enter, place_of
from ...schema import Count, Layers, Positive, Side, Size
from ..captions import CaptionEncoder, padded_features
from ..network import Network
from ..student import Student, VectorHead, check_timesteps
from .convert import STRAY_KEYS, transformer_sizes
from .model import LlamaGen
from .text import clean_caption
from .tokenizer import LlamaGenTokenizer
from .transformer import (
    Block,
    CaptionEmbedding,
    ClassEmbedding,
    LlamaGenTransformer,
    RMSNorm,
    prefix_mask,
    rotary_table,
)

STUDENT_WRAPPERS = ("ema", "model", "module", "state_dict")

OFFICIAL_PLANS = {
    # (layers, width): (timesteps, first position whose vector is decoded as it is)
    (12, 768): ((0, 80), 80),
    (24, 1024): ((0, 80), 130),
}
"""What the published students LlamaGen-B and -L were trained for; not in their tensors."""


class LlamaGenStudentTransformer(Network):
    """Transformer from vectors (codes of known tokens, then noise) to all tokens of an image.

    As its teacher's, a sequence is a class row (or a caption padded on the left) and H * W image rows,
    and attention is causal; but a
    row holds a vector of its own position, and predicts the token of its own position: what the
    teacher would make of this noise behind what stands before it.

    Args:
        vocab_size: codes of the image tokenizer.
        grid: rows and columns of image tokens.
        hidden_size: width C.
        num_layers: transformer blocks.
        num_heads: attention heads.
        intermediate_size: width of the feed-forward layer.
        num_classes: classes, None for a student of a text-conditional teacher.
        code_dim: width D of a code.
        timesteps: numbers of known tokens that it was trained for, 0 first.
        split: positions from here on are decoded from the predicted vector, not from a code.
        teacher_name: name or folder of the teacher's pipeline, None if unknown.
        codebook_mark: tells the codebook it was trained for, see `arvision.decoding.student`; None if
            unknown.
        caption_dim: width of the caption features of a text-conditional student.
        caption_length: rows of a padded caption.
        norm_eps: epsilon of the RMS normalisation.
        rope_theta: base of the rotary frequencies.

    Raises:
        InputError: timesteps that do not fit the grid, or not one of classes and captions.

    Paper: Liu et al., "Distilled Decoding 1", 2024, section 3.3 and appendix.
    """

    local_models = ("teacher_name",)
    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        vocab_size: Size = 16384,
        grid: tuple[Side, Side] = (16, 16),
        hidden_size: Size = 768,
        num_layers: Layers = 12,
        num_heads: Size = 12,
        intermediate_size: Size | None = None,
        num_classes: Size | None = 1000,
        code_dim: Size = 8,
        timesteps: Sequence[Count] = (0, 80),
        split: Count | None = None,
        teacher_name: str | None = None,
        codebook_mark: Sequence[float] | None = None,
        caption_dim: Size | None = None,
        caption_length: Side = 120,
        norm_eps: Positive = 1e-5,
        rope_theta: Positive = 10000.0,
    ) -> None:
        super().__init__()
        check_timesteps(timesteps, grid[0] * grid[1])
        if (num_classes is None) == (caption_dim is None):
            raise InputError("expected either num_classes or caption_dim, and not both")
        hidden = intermediate_size or -(-(8 * hidden_size // 3) // 256) * 256
        self.num_condition_tokens = 1 if caption_dim is None else caption_length
        self.cls_embedding: Any = (
            ClassEmbedding(num_classes, hidden_size)
            if num_classes is not None
            else CaptionEmbedding(caption_dim or 0, hidden_size, caption_length)
        )
        self.tok_embeddings = nn.Linear(code_dim, hidden_size)
        self.layers = nn.ModuleList(
            Block(hidden_size, num_heads, num_heads, hidden, norm_eps) for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = Linear(hidden_size, vocab_size, bias=False)
        self.final_layer_conti = VectorHead(hidden_size, code_dim)
        self.n_d_embed = nn.Embedding(2, hidden_size)
        self._rotary: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "table" not in name:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_teacher(
        cls,
        teacher: LlamaGenTransformer,
        codebook: Tensor,
        intermediate_size: int | None = None,
        **settings: Any,
    ) -> LlamaGenStudentTransformer:
        """A student with its teacher's sizes and, wherever shapes allow, its weights.

        The embedding of vectors starts as the best linear fit of the teacher's token embedding.

        Args:
            teacher: class- or text-conditional.
            codebook: [V, D] of its tokenizer.
            intermediate_size: width of the feed-forward layers, of which the units with the largest
                weights are kept; None for the teacher's.
            **settings: `timesteps`, `split`, `teacher_name`, `codebook_mark`.

        Raises:
            InputError: a teacher with grouped queries, or narrower than `intermediate_size`.
        """
        config = teacher.config
        if (config["num_kv_heads"] or config["num_heads"]) != config["num_heads"]:
            raise InputError("the teacher has grouped queries: expected as many key heads as heads")
        names = ("vocab_size", "grid", "hidden_size", "num_layers", "num_heads", "num_classes")
        names += ("caption_dim", "caption_length", "norm_eps", "rope_theta")
        sizes = {name: config[name] for name in names}
        kept = ("cls_embedding.", "layers.", "norm.", "output.")
        weights = {k: v for k, v in teacher.state_dict().items() if k.startswith(kept)}
        hidden = len(weights["layers.0.feed_forward.w1.weight"])
        if intermediate_size is not None and intermediate_size < hidden:
            hidden, weights = intermediate_size, _narrowed(weights, intermediate_size)
        elif intermediate_size is not None and intermediate_size > hidden:
            raise InputError(f"intermediate_size {intermediate_size}: the teacher has {hidden}")
        student = cls(**sizes, intermediate_size=hidden, code_dim=codebook.shape[1], **settings)
        student.load_state_dict(weights, strict=False)
        ones = codebook.new_ones(len(codebook), 1)
        inputs = torch.cat([codebook, ones], dim=1).double()
        rows = teacher.tok_embeddings.weight.detach().to(inputs)
        fit = torch.linalg.lstsq(inputs, rows).solution
        with torch.no_grad():
            student.tok_embeddings.weight.copy_(fit[:-1].T)
            student.tok_embeddings.bias.copy_(fit[-1])
        return student

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> LlamaGenStudentTransformer:
        """Load the authors' checkpoint, such as `LlamaGen-DD/llamagen-B.pt` (its average is taken).

        Args:
            source: path or state dict.
            **sizes: what cannot be read off: `num_heads`, `grid`, `timesteps` and `split` where the
                sizes are not those of the published students; `dtype` and `device`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        tensors = {
            key: value
            for key, value in read_state_dict(source, STUDENT_WRAPPERS).items()
            if key != "codebook" and not key.endswith("causal_mask")
        }
        sizes, place = split_placement(sizes)
        width, code_dim = shape_of(tensors, "tok_embeddings.weight", 2, name)
        vocab = shape_of(tensors, "output.weight", 2, name)[0]
        own = {key: sizes.pop(key) for key in ("timesteps", "split") if key in sizes}
        # The rest of the layout is the teacher's, whose table of embeddings has other sides.
        like_teacher = tensors | {"tok_embeddings.weight": torch.empty(vocab, width, device="meta")}
        if "freqs_cis" not in tensors:
            sizes.setdefault("grid", (16, 16))
        found = transformer_sizes(like_teacher, name, sizes, source)
        found.pop("num_kv_heads")
        plan = OFFICIAL_PLANS.get((found["num_layers"], width), ((0,), None))
        found |= {"code_dim": code_dim, "timesteps": plan[0], "split": plan[1]} | own
        weights = {key: value for key, value in tensors.items() if key not in STRAY_KEYS}
        return load_strictly(cls, found, weights, name, **place)

    @property
    def num_tokens(self) -> int:
        """Image tokens of one sample."""
        return self.config["grid"][0] * self.config["grid"][1]

    def ends(self) -> tuple[int, ...]:
        """Tokens up to the end of each unit, which is a token."""
        return tuple(range(1, self.num_tokens + 1))

    def rotary(self) -> Tensor:
        """The rotary table of the whole sequence, float32 (float64 in a float64 model)."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        place = place_of(self)
        key = (place, dtype)
        if key not in self._rotary:
            width = self.config["hidden_size"] // self.config["num_heads"]
            rows, theta = self.num_condition_tokens, self.config["rope_theta"]
            table = rotary_table(tuple(self.config["grid"]), width, rows, theta)
            self._rotary[key] = table.to(device=place, dtype=dtype)
        return self._rotary[key]

    def forward(
        self, condition: Tensor, vectors: Tensor, known: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, D] of every position, float32 or wider.

        Args:
            condition: class ids [B] int64, or caption features [B, P, caption_dim].
            vectors: [B, N, D], codes of the known tokens, then noise.
            known: [B] int64, how many tokens are known.
            valid: [B, P] bool, false on the padding of a caption; None for classes.
        """
        rows = self.cls_embedding(condition)
        num = rows.shape[1]
        places = torch.arange(vectors.shape[1] + num, device=vectors.device)
        is_data = (places < num + known[:, None]).long()
        x = torch.cat([rows, self.tok_embeddings(vectors.to(rows.dtype))], dim=1)
        x = x + self.n_d_embed(is_data)
        mask = None if valid is None else prefix_mask(valid, x.shape[1])
        rotary = self.rotary()[: x.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, index, mask=mask, is_causal=mask is None)
        x = x[:, num:]
        if valid is not None:  # one row stands for the caption
            share = valid.to(rows) / valid.sum(1, keepdim=True)
            rows = (share[..., None] * rows).sum(1, keepdim=True)
        logits, out = self.output(self.norm(x)), self.final_layer_conti(x, rows)
        return (logits, out) if logits.dtype == torch.float64 else (logits.float(), out.float())


def _narrowed(weights: Mapping[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """The same weights with `hidden` feed-forward units in each layer, those that weigh most."""
    found = dict(weights)
    for name in [name for name in found if name.endswith("feed_forward.w1.weight")]:
        stem = name.removesuffix("w1.weight")
        into, gate, back = (found[f"{stem}{part}.weight"].float() for part in ("w1", "w3", "w2"))
        weight = into.norm(dim=1) * gate.norm(dim=1) * back.norm(dim=0)
        kept = weight.topk(hidden).indices.sort().values
        for part, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
            key = f"{stem}{part}.weight"
            found[key] = found[key].index_select(axis, kept)
    return found


class LlamaGenStudent(Student):
    """A LlamaGen student with its image tokenizer; its units are tokens, see `Student`.

    Args:
        transformer: the network.
        tokenizer: its teacher's image tokenizer.
        class_names: names of the classes, in the order of their ids.
        text_encoder: T5-style encoder of a text-conditional student, its teacher's.
        text_tokenizer: of the text encoder.
    """

    fits = {"vocab_size": "codebook_size", "code_dim": "code_dim"}
    transformer: LlamaGenStudentTransformer
    tokenizer: LlamaGenTokenizer

    def __init__(
        self,
        transformer: LlamaGenStudentTransformer,
        tokenizer: LlamaGenTokenizer | None,
        class_names: Sequence[str] | None = None,
        text_encoder: nn.Module | None = None,
        text_tokenizer: Any = None,
    ) -> None:
        super().__init__(transformer, tokenizer, class_names)
        self.captions = None
        if text_encoder is not None and text_tokenizer is not None:
            length = transformer.config["caption_length"]
            self.captions = CaptionEncoder(text_encoder, text_tokenizer, length, clean_caption)

    def to(self, *args: Any, **kwargs: Any) -> LlamaGenStudent:
        """Move or cast all networks, as `nn.Module.to` does; returns the model itself."""
        if self.captions is not None:
            self.captions.text_encoder.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def start_from(self, other: Student) -> None:
        """As for all students; of feed-forward layers that are wider the units that weigh most."""
        super().start_from(other)
        wide = other.transformer.state_dict()
        hidden = len(self.transformer.state_dict()["layers.0.feed_forward.w1.weight"])
        if hidden < len(wide["layers.0.feed_forward.w1.weight"]):
            narrow = _narrowed(wide, hidden)
            own = {k: v for k, v in narrow.items() if ".feed_forward." in k}
            self.transformer.load_state_dict(own, strict=False)

    def describe(self, conditions: Conditions) -> tuple[Tensor, ...]:
        """Class ids [B]; or features [B, P, caption_dim] of captions and the rows that count [B, P]."""
        config = self.transformer.config
        if config["caption_dim"] is None:
            return super().describe(conditions)
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        shape = (config["caption_length"], config["caption_dim"])
        place = torch.empty(0, device=self.device, dtype=self.dtype)
        return padded_features(conditions, self.captions, shape, place)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return tuple(self.transformer.config["grid"])

    @classmethod
    def from_teacher(
        cls, teacher: LlamaGen, timesteps: Sequence[int] | None = None, **settings: Any
    ) -> LlamaGenStudent:
        """A student in float32 with its teacher's weights, to be trained.

        Args:
            teacher: class- or text-conditional, with its image tokenizer.
            timesteps: numbers of known tokens to train for; None for 0 and 5/16 of all, as the
                published students have.
            **settings: `split`, `teacher_name`, `intermediate_size`.

        Raises:
            InputError: a teacher without an image tokenizer, or of sizes that students do not have.
        """
        if teacher.tokenizer is None:
            raise InputError("the teacher has no image tokenizer: expected one, for its codes")
        codes = enter(teacher.tokenizer, "codes").detach().float().cpu()
        steps = (0, teacher.num_tokens * 5 // 16) if timesteps is None else tuple(timesteps)
        network = LlamaGenStudentTransformer.from_teacher(
            teacher.transformer,
            codes,
            timesteps=steps,
            codebook_mark=codebook_mark(codes),
            **settings,
        )
        captions = teacher.captions
        texts = () if captions is None else (captions.text_encoder, captions.text_tokenizer)
        return cls(network, teacher.tokenizer, teacher.class_names, *texts)

    @classmethod
    def from_official(
        cls,
        transformer: str | Path | Mapping[str, Any],
        tokenizer: str | Path | Mapping[str, Any],
        **sizes: Any,
    ) -> LlamaGenStudent:
        """Load the authors' checkpoints: `LlamaGen-DD/llamagen-B.pt` and `vq_ds16_c2i.pt`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        network = LlamaGenStudentTransformer.from_official(transformer, **sizes)
        _, place = split_placement(sizes)
        return cls(network, LlamaGenTokenizer.from_official(tokenizer, **place))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N], or vectors [B, N, D] in their place, to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: tokens of another shape or range.
        """
        if tokens.is_floating_point():
            return self.decode_vectors(tokens).clamp(-1, 1)
        return enter(self.tokenizer, "decode", tokens, self.grid).float().clamp(-1, 1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors [B, N, D] to pixels [B, 3, H, W], not clamped; gradients pass."""
        codes = vectors.to(self.tokenizer.dtype).transpose(1, 2).unflatten(2, self.grid)
        return enter(self.tokenizer, "decode_codes", codes).float()
