"""Losses that no preset has, each a function for `policy_loss(objective=...)`: the kernels read the
logits and write their gradient, autograd differentiates what is in between."""

import torch


def clipped(t, low=0.2, high=0.2):
    """PPO's clipped surrogate."""
    ratio = (t.logprobs - t.old_logprobs).exp()
    return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(1 - low, 1 + high))


def covariance(t):
    """Of advantage and log-probability over the batch, per token (arXiv 2505.22617, eq. 10). Tokens
    that don't count hold 0, so a sum is one over those that do."""
    counted = t.mask.sum()
    advantages, logprobs = t.advantages, t.logprobs.detach()
    return (advantages - advantages.sum() / counted) * (logprobs - logprobs.sum() / counted)


def clip_cov(share=2e-4, low=1.0, high=5.0):
    """A random share of the tokens whose covariance lies between low and high has no gradient."""

    def loss(t):
        each, ratio = clipped(t), (t.logprobs - t.old_logprobs).exp()
        unclipped = each <= -t.advantages * ratio
        cov = covariance(t)
        candidates = (t.mask & unclipped & (cov > low) & (cov < high)).nonzero()
        most = max(int(share * t.mask.sum()), 1)
        dropped = candidates[torch.randperm(len(candidates))[:most]]
        keep = torch.ones_like(each).index_put(tuple(dropped.T), each.new_zeros(()))
        return each * keep

    return loss


def kl_cov(share=2e-4, coef=1.0):
    """The ratio without a clip, and |log r| as a penalty on the share of the tokens whose
    covariance is largest."""

    def loss(t):
        moved = t.logprobs - t.old_logprobs
        cov = covariance(t).masked_fill(~t.mask, -torch.inf).flatten()
        largest = cov.topk(max(1, int(share * t.mask.sum()))).indices
        chosen = torch.zeros_like(cov).index_fill(0, largest, 1.0).view(moved.shape)
        return -t.advantages * moved.exp() + coef * chosen * moved.abs()

    return loss


def score_centering(cap=2.0):
    """The truncated ratio as a weight on the score, less what that weight leaves of the score's
    mean over the engine's distribution (arXiv 2609.20807): its top K and one bucket for the rest.
    Goes with topk_ids and topk_logprobs; old_logprobs are the engine's too."""

    def loss(t):
        log_p, q, p = t.topk_logprobs, t.old_topk_logprobs.exp(), t.topk_logprobs.detach().exp()
        rest_p, rest_q = ((1 - x.sum(-1, keepdim=True)).clamp(min=1e-12) for x in (p, q))
        alpha = rest_q / rest_p * (rest_p / rest_q).clamp(max=cap)
        centre = ((q * (p / q).clamp(max=cap) - alpha * p) * log_p).sum(-1)
        ratio = (t.logprobs.detach() - t.old_logprobs).exp().clamp(max=cap)
        return -t.advantages * (ratio * t.logprobs - torch.where(t.mask, centre, 0.0))

    return loss


def high_entropy(share=0.2):
    """Only the share of the tokens with the largest entropy has a gradient (arXiv 2506.01939). Goes
    with with_entropy=True."""

    def loss(t):
        threshold = t.entropy[t.mask].detach().quantile(1 - share)
        return clipped(t) * (t.entropy.detach() >= threshold)

    return loss
