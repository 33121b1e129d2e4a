"""Students of Distilled Decoding for LlamaGen: the network, and the family object around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, shape_of, split_placement
from ...decoding.student import codebook_mark
from ...errors import InputError
from ...kernels.linear import Linear
from ...networks import enter, place_of
from ...schema import Count, Layers, Positive, Side, Size
from ..network import Network
from ..student import Student, VectorHead, check_timesteps
from .convert import STRAY_KEYS, transformer_sizes
from .model import LlamaGen
from .tokenizer import LlamaGenTokenizer
from .transformer import Block, ClassEmbedding, LlamaGenTransformer, RMSNorm, rotary_table

STUDENT_WRAPPERS = ("ema", "model", "module", "state_dict")

OFFICIAL_PLANS = {
    # (layers, width): (timesteps, first position whose vector is decoded as it is)
    (12, 768): ((0, 80), 80),
    (24, 1024): ((0, 80), 130),
}
"""What the published students LlamaGen-B and -L were trained for; not in their tensors."""


class LlamaGenStudentTransformer(Network):
    """Transformer from vectors (codes of known tokens, then noise) to all tokens of an image.

    As its teacher's, a sequence is a class row and H * W image rows, and attention is causal; but a
    row holds a vector of its own position, and predicts the token of its own position: what the
    teacher would make of this noise behind what stands before it.

    Args:
        vocab_size: codes of the image tokenizer.
        grid: rows and columns of image tokens.
        hidden_size: width C.
        num_layers: transformer blocks.
        num_heads: attention heads.
        intermediate_size: width of the feed-forward layer.
        num_classes: classes.
        code_dim: width D of a code.
        timesteps: numbers of known tokens that it was trained for, 0 first.
        split: positions from here on are decoded from the predicted vector, not from a code.
        teacher_name: name or folder of the teacher's pipeline, None if unknown.
        codebook_mark: tells the codebook it was trained for, see `arvision.decoding.student`; None if
            unknown.
        norm_eps: epsilon of the RMS normalisation.
        rope_theta: base of the rotary frequencies.

    Raises:
        InputError: timesteps that do not fit the grid.

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
        num_classes: Size = 1000,
        code_dim: Size = 8,
        timesteps: Sequence[Count] = (0, 80),
        split: Count | None = None,
        teacher_name: str | None = None,
        codebook_mark: Sequence[float] | None = None,
        norm_eps: Positive = 1e-5,
        rope_theta: Positive = 10000.0,
    ) -> None:
        super().__init__()
        check_timesteps(timesteps, grid[0] * grid[1])
        hidden = intermediate_size or -(-(8 * hidden_size // 3) // 256) * 256
        self.cls_embedding = ClassEmbedding(num_classes, hidden_size)
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
        cls, teacher: LlamaGenTransformer, codebook: Tensor, **settings: Any
    ) -> LlamaGenStudentTransformer:
        """A student with its teacher's sizes and, wherever shapes allow, its weights.

        The embedding of vectors starts as the best linear fit of the teacher's token embedding.

        Args:
            teacher: class-conditional.
            codebook: [V, D] of its tokenizer.
            **settings: `timesteps`, `split`, `teacher_name`, `codebook_mark`.

        Raises:
            InputError: a text-conditional teacher, or one with grouped queries.
        """
        config = teacher.config
        if teacher.is_text_conditional:
            raise InputError("the teacher is text-conditional: expected a class-conditional one")
        if (config["num_kv_heads"] or config["num_heads"]) != config["num_heads"]:
            raise InputError("the teacher has grouped queries: expected as many key heads as heads")
        names = ("vocab_size", "grid", "hidden_size", "num_layers", "num_heads", "num_classes")
        sizes = {name: config[name] for name in (*names, "norm_eps", "rope_theta")}
        hidden = len(teacher.state_dict()["layers.0.feed_forward.w1.weight"])
        student = cls(**sizes, intermediate_size=hidden, code_dim=codebook.shape[1], **settings)
        kept = ("cls_embedding.", "layers.", "norm.", "output.")
        weights = {k: v for k, v in teacher.state_dict().items() if k.startswith(kept)}
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
            table = rotary_table(tuple(self.config["grid"]), width, 1, self.config["rope_theta"])
            self._rotary[key] = table.to(device=place, dtype=dtype)
        return self._rotary[key]

    def forward(self, class_ids: Tensor, vectors: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, D] of every position, float32 or wider.

        Args:
            class_ids: [B] int64.
            vectors: [B, N, D], codes of the known tokens, then noise.
            known: [B] int64, how many tokens are known.
        """
        condition = self.cls_embedding(class_ids)
        places = torch.arange(vectors.shape[1] + 1, device=vectors.device)
        is_data = (places <= known[:, None]).long()
        x = torch.cat([condition, self.tok_embeddings(vectors.to(condition.dtype))], dim=1)
        x = x + self.n_d_embed(is_data)
        rotary = self.rotary()[: x.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, index, is_causal=True)
        x = x[:, 1:]
        logits, out = self.output(self.norm(x)), self.final_layer_conti(x, condition)
        return (logits, out) if logits.dtype == torch.float64 else (logits.float(), out.float())


class LlamaGenStudent(Student):
    """A LlamaGen student with its image tokenizer; its units are tokens, see `Student`."""

    fits = {"vocab_size": "codebook_size", "code_dim": "code_dim"}
    transformer: LlamaGenStudentTransformer
    tokenizer: LlamaGenTokenizer

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
            teacher: class-conditional, with its image tokenizer.
            timesteps: numbers of known tokens to train for; None for 0 and 5/16 of all, as the
                published students have.
            **settings: `split`, `teacher_name`.

        Raises:
            InputError: a teacher without an image tokenizer, or not class-conditional.
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
        return cls(network, teacher.tokenizer, teacher.class_names)

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
