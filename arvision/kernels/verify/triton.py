"""Verification in Triton.

Of a window one program decides one position and draws its token. Down a tree one program walks for
a row: `_walk` along what was chosen, `_try` along siblings that it tries in turn.
"""

# Type checkers see neither a launch nor what becomes of a constexpr.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inversion.triton import inversion_step

BLOCK = 2048


@triton.jit
def _settle(
    drafts, draft_logp, target_logp, accept_u, recover_u, fresh_u, tokens, counts,
    window, size,
    MAXIMAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64)
    # All tests of the row are made here again: m gathers cost less than a second launch.
    draft_at = tl.arange(0, BLOCK_M).to(tl.int64)
    is_draft = draft_at < window
    draft = tl.load(drafts + row * window + draft_at, mask=is_draft, other=-1)
    has = draft >= 0
    target_row = target_logp + row * (window + 1) * size
    draft_row = draft_logp + row * window * size
    log_p = tl.load(target_row + draft_at * size + draft, mask=has, other=float("-inf"))
    log_q = tl.load(draft_row + draft_at * size + draft, mask=has, other=0.0)
    u = tl.load(accept_u + row * window + draft_at, mask=is_draft, other=0.5)
    accepted = (tl.log(u) < (log_p - log_q).to(tl.float64)) & has
    rejected_at = tl.where(accepted, BLOCK_M, draft_at)
    first = tl.minimum(tl.min(rejected_at, 0), window)
    mine = draft_at == place
    own = tl.max(tl.where(mine, draft, -1), 0)
    if MAXIMAL:
        keeps = tl.max((mine & accepted).to(tl.int32), 0) > 0
        recovers = place < window
    else:
        keeps = place < first
        recovers = (place == first) & (own >= 0)
        tl.store(counts + row, first + 1, mask=place == 0)

    result = own
    if not keeps:
        uniform = tl.load(fresh_u + row * (window + 1) + place)
        if recovers:
            uniform = tl.load(recover_u + row * window + place)
        total = tl.zeros([], tl.float64)
        residual = tl.zeros([], tl.float64)
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = token < size
            p = tl.exp(tl.load(target_row + place * size + token, mask=inside, other=float("-inf")))
            q = tl.load(
                draft_row + place * size + token, mask=inside & recovers, other=float("-inf")
            )
            total += tl.sum(p.to(tl.float64), 0)
            residual += tl.sum(tl.maximum(p - tl.exp(q), 0.0).to(tl.float64), 0)
        # The target stands in where there is no draft, and for a residual that rounding emptied.
        is_empty = (residual <= 0) | (own < 0)
        share = uniform * tl.where(is_empty, total, residual)
        carry = tl.zeros([], tl.float64)
        found = tl.full([], 1 << 40, tl.int64)
        last = tl.zeros([], tl.int64)
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = token < size
            p = tl.exp(tl.load(target_row + place * size + token, mask=inside, other=float("-inf")))
            q = tl.load(
                draft_row + place * size + token, mask=inside & recovers, other=float("-inf")
            )
            mass = tl.where(is_empty, p, tl.maximum(p - tl.exp(q), 0.0)).to(tl.float64)
            carry, found, last = inversion_step(mass, token, carry, share, found, last)
        result = tl.where(found < size, found, last)
    tl.store(tokens + row * (window + 1) + place, result)


@triton.jit
def _count(drafts, tokens, counts, window, BLOCK_M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_M).to(tl.int64)
    draft = tl.load(drafts + row * window + at, mask=at < window, other=-1)
    token = tl.load(tokens + row * (window + 1) + at, mask=at < window, other=-2)
    changed_at = tl.where(draft == token, BLOCK_M, at)
    tl.store(counts + row, tl.minimum(tl.min(changed_at, 0), window) + 1)


@triton.jit
def _walk(
    drafts, choice, laws, depths, bits, tokens, path, counts,
    num, levels, l_b, d_b, a_b, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_M).to(tl.int64)
    is_node = node < num
    draft = tl.load(drafts + row * num + node, mask=is_node, other=-1)
    law = tl.load(laws + row * l_b + node, mask=is_node, other=0)
    depth = tl.load(depths + row * d_b + node, mask=is_node, other=0)
    above = tl.load(bits + row * a_b + node, mask=is_node, other=0)
    token = tl.load(choice + row * (num + 1) + law, mask=is_node, other=-2)
    passes = (draft == token) & (draft >= 0) & is_node
    one = tl.full([BLOCK_M], 1, tl.int64)
    # Bits of different drafts: a sum sets them, and may wrap into the sign.
    passed = tl.sum(tl.where(passes, one << node, 0), 0)
    reached = passes & ((above & passed) == above)
    length = tl.where(reached, depth + 1, 0)
    count = tl.max(length, 0)
    last = tl.min(tl.where(length == count, node, BLOCK_M), 0)
    is_last = (node == last) & (count > 0)
    chain = tl.sum(tl.where(is_last, above, 0), 0)
    on_path = ((chain >> node) & 1) != 0
    bonus = tl.load(choice + row * (num + 1) + tl.where(count > 0, last + 1, 0))
    tl.store(path + row * levels + depth, node, mask=on_path)
    tl.store(tokens + row * (levels + 1) + depth, draft, mask=on_path)
    tl.store(tokens + row * (levels + 1) + count, bonus)
    tl.store(counts + row, count + 1)


@triton.jit
def _taken(rest, token, inside, drafted, DRAWN: tl.constexpr):
    """What a rejected sibling takes of the law at some tokens: the law it was drawn from, or all of its own."""
    if DRAWN:
        q = tl.load(rest + token, mask=inside, other=0.0)
    else:
        q = tl.where(token == drafted, 1.0, 0.0).to(tl.float64)
    return q


@triton.jit
def _try(
    drafts, children, target_logp, draft_logp, accept_u, recover_u, left, rest, tokens, path, counts,
    num, levels, width, size, c_b,
    DRAWN: tl.constexpr, REPLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    left += row * size
    rest += row * size
    law = tl.zeros([], tl.int64)
    level = tl.zeros([], tl.int64)
    going = tl.full([], 1, tl.int32)
    while going > 0:
        own = children + row * c_b + law * width
        at = row * (num + 1) + law
        first = tl.maximum(tl.load(own), 0)
        # What is left of the target's law, and the law that the next sibling counts as drawn from.
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = token < size
            p = tl.load(target_logp + at * size + token, mask=inside, other=float("-inf"))
            tl.store(left + token, tl.exp(p).to(tl.float64), mask=inside)
            if DRAWN:
                q = tl.load(
                    draft_logp + (row * num + first) * size + token, mask=inside & (num > 0),
                    other=float("-inf"),
                )  # fmt: skip
                tl.store(rest + token, tl.exp(q).to(tl.float64), mask=inside)
        tl.debug_barrier()
        accepted = tl.full([], -1, tl.int64)
        place = tl.zeros([], tl.int64)
        while (place < width) & (accepted < 0):
            child = tl.load(own + place).to(tl.int64)
            drafted = tl.load(drafts + row * num + child, mask=child >= 0, other=-1)
            if drafted >= 0:
                probability = tl.load(left + drafted)
                q_own = tl.full([], 1.0, tl.float64)
                if DRAWN:
                    q_own = tl.load(rest + drafted)
                u = tl.load(accept_u + at * width + place)
                # Nobody may change what others have not read yet.
                tl.debug_barrier()
                if u * q_own < probability:
                    accepted = child
                else:
                    total = tl.zeros([], tl.float64)
                    kept = tl.zeros([], tl.float64)
                    for start in range(0, size, BLOCK):
                        token = start + tl.arange(0, BLOCK).to(tl.int64)
                        inside = token < size
                        r = tl.load(left + token, mask=inside, other=0.0)
                        q = _taken(rest, token, inside, drafted, DRAWN)
                        if DRAWN:
                            kept += tl.sum(tl.where(token == drafted, 0.0, q), 0)
                        total += tl.sum(tl.maximum(r - q, 0.0), 0)
                    for start in range(0, size, BLOCK):
                        token = start + tl.arange(0, BLOCK).to(tl.int64)
                        inside = token < size
                        r = tl.load(left + token, mask=inside, other=0.0)
                        q = _taken(rest, token, inside, drafted, DRAWN)
                        # An empty residual leaves what was.
                        if total > 0:
                            tl.store(left + token, tl.maximum(r - q, 0.0) / total, mask=inside)
                        if DRAWN and not REPLACES:
                            q = tl.where(token == drafted, 0.0, q)
                            q = q / tl.where(kept > 0, kept, 1.0)
                            tl.store(rest + token, q, mask=inside)
                    tl.debug_barrier()
            place += 1
        if (accepted >= 0) & (level < levels):
            tl.store(tokens + row * (levels + 1) + level, tl.load(drafts + row * num + accepted))
            tl.store(path + row * levels + level, accepted)
            law = accepted + 1
            level += 1
        else:
            total = tl.zeros([], tl.float64)
            for start in range(0, size, BLOCK):
                token = start + tl.arange(0, BLOCK).to(tl.int64)
                total += tl.sum(tl.load(left + token, mask=token < size, other=0.0), 0)
            share = tl.load(recover_u + at) * total
            carry = tl.zeros([], tl.float64)
            found = tl.full([], 1 << 40, tl.int64)
            last = tl.zeros([], tl.int64)
            for start in range(0, size, BLOCK):
                token = start + tl.arange(0, BLOCK).to(tl.int64)
                mass = tl.load(left + token, mask=token < size, other=0.0)
                carry, found, last = inversion_step(mass, token, carry, share, found, last)
            result = tl.where(found < size, found, last)
            tl.store(tokens + row * (levels + 1) + level, result)
            tl.store(counts + row, level + 1)
            going = tl.zeros([], tl.int32)
        # The next place writes over what this one has read.
        tl.debug_barrier()


def verify(
    drafts: Tensor,
    draft_logp: Tensor,
    target_logp: Tensor,
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
    fresh_uniforms: Tensor,
    coupling: str,
) -> tuple[Tensor, Tensor]:
    """See `arvision.kernels.verify.verify`."""
    tokens, counts = _results(drafts)
    batch, window = drafts.shape
    block_m = triton.next_power_of_2(window + 1)
    if batch:
        given = (drafts, draft_logp, target_logp, accept_uniforms, recover_uniforms, fresh_uniforms)
        _settle[(batch, window + 1)](
            *(tensor.contiguous() for tensor in given), tokens, counts,
            window, target_logp.shape[2],
            MAXIMAL=coupling == "maximal", BLOCK_M=block_m, BLOCK=_block(target_logp),
            num_warps=8,
        )  # fmt: skip
        if coupling == "maximal":
            _count[(batch,)](drafts.contiguous(), tokens, counts, window, BLOCK_M=block_m)
    return tokens, counts


def follow(
    drafts: Tensor,
    choice: Tensor,
    tree: tuple[Tensor, Tensor, Tensor] | None,
    num_levels: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `arvision.kernels.verify.follow`."""
    batch, num = drafts.shape
    counts = torch.empty(batch, dtype=torch.int64, device=drafts.device)
    drafts, choice = drafts.contiguous(), choice.contiguous()
    if tree is None:
        if batch:
            block_m = triton.next_power_of_2(num + 1)
            _count[(batch,)](drafts, choice, counts, num, BLOCK_M=block_m)
        return choice, counts, None
    if num == 0:
        return choice, counts.fill_(1), choice[:, :0]
    tokens = choice.new_zeros(batch, num_levels + 1)
    path = choice.new_zeros(batch, num_levels)
    parts = [part.contiguous() for part in tree]
    strides = [num if part.dim() == 2 else 0 for part in parts]
    if batch:
        _walk[(batch,)](
            drafts, choice, *parts, tokens, path, counts, num, num_levels, *strides,
            BLOCK_M=max(2, triton.next_power_of_2(num)), num_warps=2,
        )  # fmt: skip
    return tokens, counts, path


def in_turn(
    drafts: Tensor,
    children: Tensor,
    target_logp: Tensor,
    draft_logp: Tensor | None,
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
    num_levels: int,
    replaces: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `arvision.kernels.verify.in_turn`."""
    batch, num = drafts.shape
    size, width = target_logp.shape[2], children.shape[-1]
    tokens = drafts.new_zeros(batch, num_levels + 1)
    path, counts = drafts.new_zeros(batch, num_levels), torch.empty_like(tokens[:, 0])
    is_drawn = draft_logp is not None
    laws = [target_logp.contiguous()] * 2
    if draft_logp is not None:
        laws[1] = draft_logp.to(target_logp.dtype).contiguous()
    # What is left of the two laws of a row at the place where it stands.
    left = torch.empty(1 + is_drawn, batch, size, dtype=torch.float64, device=target_logp.device)
    if batch:
        _try[(batch,)](
            drafts.contiguous(), children.contiguous(), *laws, accept_uniforms.contiguous(),
            recover_uniforms.contiguous(), left[0], left[-1], tokens, path, counts,
            num, num_levels, width, size, 0 if children.dim() == 2 else (num + 1) * width,
            DRAWN=is_drawn, REPLACES=replaces, BLOCK=_block(target_logp), num_warps=8,
        )  # fmt: skip
    return tokens, counts, path


def _block(logp: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logp.shape[2]))


def _results(drafts: Tensor) -> tuple[Tensor, Tensor]:
    batch, window = drafts.shape
    tokens = torch.empty(batch, window + 1, dtype=torch.int64, device=drafts.device)
    return tokens, torch.empty(batch, dtype=torch.int64, device=drafts.device)
