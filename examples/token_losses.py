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
    Goes with topk_ids and topk_logprobs; old_logprobs are the engine's too. Two passes over a row:
    dk.cispo(cap, score_centering=True) is the same in one."""

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


def m2po(threshold=0.04):
    """The plain ratio, without the tokens that move furthest (arXiv 2510.01161, algorithm 1): of
    those that a clip could stop, as many as bring the mean of their (log r)^2 to the threshold."""

    def loss(t):
        moved = t.logprobs - t.old_logprobs
        square = moved.detach().square()
        stoppable = t.mask & (t.advantages * moved > 0)
        values = square.masked_fill(~stoppable, torch.inf).flatten().sort().values
        means = values.cumsum(0) / torch.arange(1, len(values) + 1, device=values.device)
        furthest = values.masked_fill(means > threshold, -1.0).max()
        return -t.advantages * moved.exp() * ~(stoppable & (square > furthest))

    return loss


def before(x, response):
    """Of x >= 0, all responses one after the other: the sum over the earlier tokens of its own."""
    sums = x.double().cumsum(0) - x
    first = sums.new_full((int(response.max()) + 1,), torch.inf)
    return sums - first.scatter_reduce(0, response, sums, "amin")[response]


def cppo(limit=0.2, budget=0.02, least=0.8):
    """DPPO's mask on |p - q|, stricter for early tokens, whose drift the rest of a response
    inherits, and after a prefix that has used up its budget (arXiv 2606.10968, eq. 8 to 11)."""

    def loss(t):
        ratio = (t.logprobs - t.old_logprobs).exp()
        drift = (t.logprobs.exp() - t.old_logprobs.exp()).detach().abs().flatten()
        response, counted = t.response.flatten(), t.mask.flatten().to(drift.dtype)
        share = before(counted, response) / (t.lengths[response] - 1).clamp(min=1)
        weight = counted * (1 - (1 - least) * share)
        spent, allowed = before(weight * drift, response), budget * before(weight, response)
        far = weight * drift > limit + (allowed - spent).clamp(max=0.0)
        away = t.advantages * (ratio - 1) > 0
        return -t.advantages * ratio * ~(far.view(away.shape) & away)

    return loss


def fipo(half_life=32.0, width=0.2):
    """The clipped surrogate with an advantage that follows what becomes of the rest of a response:
    times exp sum_k gamma^(k - t) log r_k over k >= t, cut to 1 +- width (arXiv 2603.19835)."""

    def loss(t):
        moved = (t.logprobs - t.old_logprobs).detach().flatten()
        response, counted = t.response.flatten(), t.mask.flatten()
        place = before(counted.to(moved.dtype), response).long()
        longest = int(t.lengths.max())
        later = moved.new_zeros(longest + 1, len(t.lengths))
        own = moved.new_zeros(longest + 1, len(t.lengths))
        own.index_put_((place, response), moved * counted, accumulate=True)
        for k in reversed(range(longest)):
            later[k] = own[k] + 0.5 ** (1 / half_life) * later[k + 1]
        weight = later[place, response].exp().clamp(1 - width, 1 + width)
        return clipped(t._replace(advantages=t.advantages * weight.view(t.mask.shape)))

    return loss
