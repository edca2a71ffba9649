"""Reading Yes/No answers off next-token distributions, where these lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from analysis.stats import MASS_FLOOR, log_odds_from_logprobs

AT_ONCE = 32  # rows of 152,064 float64 numbers: 39 MB, and a few times that on the way


def log_odds(logprobs: torch.Tensor, yes_ids: Sequence[int], no_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """What `log_odds_from_logprobs` gives for log-probabilities [n, vocab], by that function on a CPU and on
    the GPU where they lie there: only the readings come to the host (256 rows of 152,064 took 110 ms to get
    there on one H100, and 230 ms to be read).

    The formulas are the same, in float64; sums are added up in another order.
    """
    if not logprobs.is_cuda:
        return log_odds_from_logprobs(logprobs.numpy(), yes_ids, no_ids)
    return log_odds_on_device(logprobs, yes_ids, no_ids)


@torch.inference_mode()
def log_odds_on_device(
    logprobs: torch.Tensor, yes_ids: Sequence[int], no_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """`log_odds_from_logprobs` by torch, on any device."""
    yes, no = (torch.tensor(sorted(set(ids)), device=logprobs.device) for ids in (yes_ids, no_ids))
    parts = []
    for part in logprobs.split(AT_ONCE):
        # 1. renormalized, each row by its largest; a row with NaN or +inf, or of -inf alone, cannot be used
        top = part.amax(-1, keepdim=True).double()
        row = part.double() - top
        p = row.exp()
        total = p.sum(-1)
        log_yes, log_no = (row[:, ids].logsumexp(-1) - total.log() for ids in (yes, no))
        entropy = total.log() - (p * row.clamp_min(-1e4)).sum(-1) / total  # so that 0 * -inf is 0
        # 2. what is asked of them
        p_yes, p_no, odds = log_yes.exp(), log_no.exp(), log_yes - log_no
        odds = torch.where(log_yes.isfinite() & log_no.isfinite(), odds, torch.nan)
        read = torch.stack([odds, p_yes, p_no, (p_yes + p_no).clamp_max(1), odds.sigmoid(), entropy])
        parts.append(torch.where(top[:, 0].isfinite(), read, torch.nan))
    names = ["log_odds", "p_yes", "p_no", "mass", "p_yes_normalized", "entropy"]
    out = dict(zip(names, torch.cat(parts, 1).cpu().numpy(), strict=True))
    out["finite"] = np.isfinite(out["log_odds"])
    out["answered"] = out["finite"] & (np.nan_to_num(out["mass"]) >= MASS_FLOOR)
    return out


@torch.inference_mode()
def condensed(logprobs: torch.Tensor, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities [n, vocab] as a small vocabulary has them: those of `ids`, in order, and last those
    of all other tokens together. Float64 [n, ids + 1] on the CPU."""
    columns = torch.tensor(ids, device=logprobs.device)
    parts = []
    for part in logprobs.split(AT_ONCE):
        rows = part.double()
        kept = rows[:, columns]
        rest = rows.index_fill(1, columns, -torch.inf).logsumexp(-1, keepdim=True)
        parts.append(torch.cat([kept, rest], 1))
    return torch.cat(parts).cpu().numpy()
