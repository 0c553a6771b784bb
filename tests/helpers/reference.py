"""The method written out plainly, to be read beside METHOD and compared with: one sequence, plain hooks, no PEFT."""

from __future__ import annotations

import torch


def decoder_layers(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def naive_edit(h, w, b, z, m, alpha):
    """One sequence. h (seq, d), w (r, d) and b (r,) or None for the constant gate, z (r, d), m a list of 0/1."""
    edited = h.clone()
    for i in range(h.shape[0]):
        for k in range(z.shape[0]):
            gate = 1.0 if w is None else max(0.0, (torch.dot(h[i].float(), w[k]) + b[k]).item())
            edited[i] = edited[i] + (alpha * m[i] * gate * z[k]).to(h.dtype)
    return edited


def naive_logits(model, ids, weights, m, alpha):
    """Logits (seq, vocabulary) of one unpadded sequence; `weights` is {layer: (w, b, z)}."""
    hooks = []
    for layer, (w, b, z) in weights.items():

        def hook(module, args, output, w=w, b=b, z=z):
            hidden = output[0] if isinstance(output, tuple) else output
            edited = naive_edit(hidden[0], w, b, z, m, alpha).unsqueeze(0)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        hooks.append(decoder_layers(model)[layer].register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in hooks:
            handle.remove()


def naive_greedy(model, ids, weights, alpha, new_tokens):
    """Greedy generation without a cache, "response" positions: the last prompt token and all that follows."""
    prompt = len(ids)
    ids = list(ids)
    for _ in range(new_tokens):
        m = [0] * (prompt - 1) + [1] * (len(ids) - prompt + 1)
        ids.append(int(naive_logits(model, ids, weights, m, alpha)[-1].argmax()))
    return ids[prompt:]


def naive_ridge(stream, targets, strength):
    """Ridge regression with a free bias and the penalty of each feature scaled by its variance: w (m, d), b (m,)."""
    width = stream.shape[1]
    mean, deviation = stream.mean(0), stream.std(0, correction=0)
    features = (stream - mean) / deviation
    padded = torch.cat([features, (strength * len(stream)) ** 0.5 * torch.eye(width, dtype=torch.float64)])
    centred = torch.cat([targets - targets.mean(0), targets.new_zeros(width, targets.shape[1])])
    weight = torch.linalg.lstsq(padded, centred, driver="gelsd").solution.T / deviation
    return weight, targets.mean(0) - weight @ mean
