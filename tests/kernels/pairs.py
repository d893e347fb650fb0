"""Features to test losses with, their float64 reference, and errors against it."""

import torch
import torch.nn.functional as F


def pair(rows, columns, width, *, seed, dtype=torch.float32, kind="random", offset=0, duplicates=False):
    """Unit vectors ``[rows, width]`` and ``[columns, width]``, rounded to ``dtype``.

    ``aligned`` puts the cosine of row i and column i + offset near 0.9, as a trained model does.
    """
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)
    texts = F.normalize(torch.randn(columns, width, generator=generator, dtype=torch.float64), dim=1)
    if kind == "aligned":
        for row in range(max(0, -offset), min(rows, columns - offset)):
            texts[row + offset] = F.normalize(0.9 * images[row] + 0.4359 * texts[row + offset], dim=0)
    if duplicates and rows > 4:
        images[3] = images[1]
        texts[min(4, columns - 1)] = texts[min(2, columns - 1)]
        if columns > offset + 3 and offset >= 0:
            texts[offset + 3] = texts[offset + 1]
    return images.to(dtype), texts.to(dtype)


def softmax64(images, texts, scale, **matches):
    """The softmax loss in float64."""
    return softmax64_of(scale.double() * images.double() @ texts.double().T, **matches)


def softmax64_of(logits, *, offset=0, image_ids=None, text_ids=None, smoothing=0.0):
    """The softmax loss of float64 logits; without ids from odds against the match, which keeps tiny losses exact."""
    rows, columns = logits.shape
    if image_ids is None and not smoothing:
        here = torch.arange(max(0, -offset), min(rows, columns - offset))
        match = logits[here, here + offset]
        hidden = logits.clone()
        hidden[here, here + offset] = -torch.inf
        by_row = (hidden[here] - match[:, None]).exp().sum(1).log1p()
        by_column = (hidden[:, here + offset] - match).exp().sum(0).log1p()
        return (by_row.mean() + by_column.mean()) / 2
    if image_ids is None:
        matches = torch.arange(rows)[:, None] + offset == torch.arange(columns)
    else:
        matches = image_ids[:, None] == text_ids
    loss = 0.0
    for one, match in ((logits, matches), (logits.T, matches.T)):
        counted = match.any(1)
        one, match = one[counted], match[counted].double()
        target = (1 - smoothing) * match / match.sum(1, keepdim=True) + smoothing / match.shape[1]
        loss = loss - (target * one.log_softmax(1)).sum(1).mean() / 2
    return loss


def sigmoid64(images, texts, scale, bias, **matches):
    """The sigmoid loss in float64."""
    return sigmoid64_of(scale.double() * images.double() @ texts.double().T + bias.double(), **matches)


def sigmoid64_of(logits, *, offset=0, image_ids=None, text_ids=None):
    """The sigmoid loss of float64 logits."""
    rows, columns = logits.shape
    if image_ids is None:
        match = torch.arange(rows)[:, None] + offset == torch.arange(columns)
    else:
        match = image_ids[:, None] == text_ids
    return F.softplus(torch.where(match, -logits, logits), threshold=1000).sum() / rows


def value_and_gradients(function, leaves, grad_output=3.0):
    """Loss and the gradients of ``grad_output * loss`` to each leaf."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    (grad_output * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def magnitudes(loss_of_logits, images, texts, scale, bias=0.0, grad_output=3.0):
    """Norms of loss and gradients to images, texts, scale and bias if nothing cancelled: |G| |T| in place of G T.

    A duplicate of a match cancels its gradient, so that the truth may be 1e-30 of two terms of 0.5 in float32.
    """
    images, texts, scale = images.double(), texts.double(), scale.double()
    cosines = images @ texts.T
    logits = (scale * cosines + bias).requires_grad_()
    loss = loss_of_logits(logits)
    (grad,) = torch.autograd.grad(grad_output * loss, logits)
    size, scale = grad.abs(), scale.detach()
    return [
        float(loss.detach()),
        float((scale * size @ texts.abs()).norm()),
        float((scale * size.T @ images.abs()).norm()),
        float((size * cosines.abs()).sum()),
        float(size.sum()),
    ]


def errors(got, want):
    """Relative error of each in norm; absolute where the truth is 0."""
    return [float((a.double() - b).norm() / (b.norm() if b.norm() > 0 else 1.0)) for a, b in zip(got, want)]


def distances(got, want):
    """Norm of the difference of each."""
    return [float((a.double() - b.double()).norm()) for a, b in zip(got, want)]


def assert_close_to_float64(got, want, peer, magnitude, dtype, names, scale):
    """The demands on every implementation, beside those of PyTorch in the same dtype.

    Relative error of the loss at most 1e-5 (2e-3 for 16-bit inputs), of the gradients 2e-5 (2e-3), and never more than
    1.5 times PyTorch's. What float32 arithmetic cannot show is allowed on top: a rounding of terms that cancel, the
    rounding of a 16-bit gradient itself, subnormal or not, and for the loss two units in the last place of the largest
    logit (a loss of 1e-24, the odds against a match, moves by as much as its logits do; PyTorch returns 0 there).
    """
    narrow = dtype != torch.float32
    for name, error, other, b, size in zip(names, distances(got, want), distances(peer, want), want, magnitude):
        rounding = 0.0
        if narrow and name in ("images", "texts"):
            rounding = float((b.to(dtype).double() - b).norm())
        norm = float(b.norm())
        bound = (2e-3 if narrow else max(1e-5, 2.4e-7 * float(scale)) if name == "loss" else 2e-5) * norm
        assert error <= bound + 1e-6 * size + 1.01 * rounding, (name, error, other, norm, size)
        assert error <= 1.5 * other + 5e-7 * size + 1.01 * rounding, (name, error, other, norm, size)
