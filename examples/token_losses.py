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


def high_entropy(share=0.2):
    """Only the share of the tokens with the largest entropy has a gradient (arXiv 2506.01939). Goes
    with with_entropy=True."""

    def loss(t):
        threshold = t.entropy[t.mask].detach().quantile(1 - share)
        return clipped(t) * (t.entropy.detach() >= threshold)

    return loss
