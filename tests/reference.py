"""Naive algorithms: slow, obvious, and independent of the package. Tests compare with them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bit packing, bit by bit: code j of a row at bits [j*bits, (j+1)*bits) of its little-endian stream."""
    rows, n = codes.shape
    packed = torch.zeros(rows, -(-n * bits // 8), dtype=torch.uint8)
    for row in range(rows):
        for j in range(n):
            for i in range(bits):
                bit = int(codes[row, j]) >> i & 1
                position = j * bits + i
                packed[row, position // 8] += bit << (position % 8)
    return packed


def gptq(weight, hessian, scale, zero, scheme, damp: float) -> torch.Tensor:
    """Codes [out, in] by optimal brain quantization in the order of the diagonal, in float64.

    Quantize column j, spread its error by row j of the inverse Hessian over the columns left, then take j out of
    the inverse by Gaussian elimination: the algorithm that GPTQ's Cholesky factor is a reformulation of.
    """
    work, hessian = weight.double().clone(), hessian.double().clone()
    order = torch.argsort(hessian.diagonal().float(), descending=True, stable=True)
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian)
    out_features, in_features = weight.shape
    width = scheme.group_width(in_features)
    scale, zero = (x.double().expand(out_features, -1) for x in (scale, zero))
    codes = torch.zeros(out_features, in_features)
    for j in order.tolist():
        s, z = scale[:, j // width], zero[:, j // width]
        codes[:, j] = (work[:, j] / s + z).round().clamp(0, scheme.max_code).float()
        error = (work[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse -= inverse[:, j, None] * inverse[j] / inverse[j, j]
    return codes.to(torch.uint8)


def gptq_words(values: list[int], bits: int) -> list[int]:
    """Values packed as GPTQ packs a column: little end first into 32-bit words, 3 bits straddling two."""
    stream = sum(value << (index * bits) for index, value in enumerate(values))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in range(0, len(values) * bits, 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]  # as int32


def sparsegpt(weight, hessian, sparsity: float, pattern: str, damp: float, columns: int = 128):
    """Pruned weight and mask by optimal brain surgery, column by column, in float64.

    What taking out w_j costs, all columns before it fixed, is w_j^2 / inv(H[j:, j:])[0, 0]. The mask of `columns`
    columns (of M columns for "N:M") is chosen when the first of them is reached.
    """
    work, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    rows, width = weight.shape
    mask = torch.ones(rows, width, dtype=torch.bool)
    costs = [float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(width)]
    kept, group = (int(part) for part in pattern.split(":")) if ":" in pattern else (0, columns)
    for j in range(width):
        if j % group == 0:
            block = range(j, min(j + group, width))
            cells = [(float(work[row, k]) ** 2 / costs[k], row, k) for row in range(rows) for k in block]
            if kept:
                for row in range(rows):
                    for _, _, k in sorted(cell for cell in cells if cell[1] == row)[: group - kept]:
                        mask[row, k] = False
            else:
                for _, row, k in sorted(cells)[: round(len(cells) * sparsity)]:
                    mask[row, k] = False
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = torch.where(mask[:, j], 0.0, work[:, j]) / inverse[0, 0]
        work[:, j:] -= error[:, None] * inverse[0]
        work[:, j] *= mask[:, j]
    return work, mask


def wanda(weight, inputs, sparsity: float):
    """Mask by the paper's formula: in each row, the weights of least |w_ij| ||x_j|| go, in float64."""
    rows, width = weight.shape
    mask = torch.ones(rows, width, dtype=torch.bool)
    norms = [float(inputs[:, j].double().norm()) for j in range(width)]
    for i in range(rows):
        scores = sorted((abs(float(weight[i, j])) * norms[j], j) for j in range(width))
        for _, j in scores[: round(width * sparsity)]:
            mask[i, j] = False
    return mask


def sparse_gptq(weight, hessian, sparsity: float, pattern: str, scale, zero, scheme, damp: float):
    """Quantized values and mask, pruned and rounded in one pass over the columns in natural order, in float64.

    As `sparsegpt`, but that what stays of a column is rounded to its grid, and its error spread as well.
    """
    work, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    rows, width = weight.shape
    group = scheme.group_width(width)
    scale, zero = (x.double().expand(rows, -1) for x in (scale, zero))
    mask, values = torch.ones(rows, width, dtype=torch.bool), torch.zeros(rows, width, dtype=torch.float64)
    costs = [float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(width)]
    kept, together = (int(part) for part in pattern.split(":")) if ":" in pattern else (0, 128)
    for j in range(width):
        if j % together == 0:
            block = range(j, min(j + together, width))
            cells = [(float(work[row, k]) ** 2 / costs[k], row, k) for row in range(rows) for k in block]
            for pool in [[c for c in cells if c[1] == row] for row in range(rows)] if kept else [cells]:
                for _, row, k in sorted(pool)[: together - kept if kept else round(len(pool) * sparsity)]:
                    mask[row, k] = False
        s, z = scale[:, j // group], zero[:, j // group]
        rounded = ((work[:, j] / s + z).round().clamp(0, scheme.max_code) - z) * s
        values[:, j] = torch.where(mask[:, j], rounded, 0.0)
        inverse = torch.linalg.inv(hessian[j:, j:])
        work[:, j:] -= ((work[:, j] - values[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return values, mask


def svd_llm(weight, inputs, rank: int):
    """W' by the paper's formula: S the Cholesky factor of X X^T, W S = U Sigma V^T, W' = U_r Sigma_r V_r^T S^-1."""
    rows = inputs.double()
    root = torch.linalg.cholesky(rows.T @ rows)
    return _truncated(weight.double() @ root, rank) @ torch.linalg.inv(root)


def asvd(weight, inputs, rank: int, alpha: float):
    """W' = (W S)_r S^-1 with S_jj = (root mean square of input j)^alpha."""
    scale = inputs.double().square().mean(0).sqrt() ** alpha
    return _truncated(weight.double() * scale, rank) / scale


def _truncated(weight, rank: int):
    u, values, vt = torch.linalg.svd(weight)
    total = torch.zeros_like(weight)
    for i in range(rank):
        total += values[i] * torch.outer(u[:, i], vt[i])
    return total


def best_ranks(gains, shapes, budget: int, multiple: int):
    """The ranks of most summed gain with at most `budget` weights, over all choices; 0 is the whole matrix."""
    import itertools

    options = {}
    for name, (rows, width) in shapes.items():
        ranks = [r for r in range(multiple, min(rows, width), multiple) if r * (rows + width) < rows * width]
        options[name] = [(0, rows * width, float(gains[name].sum()))]
        options[name] += [(r, r * (rows + width), float(gains[name][:r].sum())) for r in ranks]
    fitting = [c for c in itertools.product(*options.values()) if sum(size for _, size, _ in c) <= budget]
    best = max(fitting, key=lambda chosen: sum(kept for _, _, kept in chosen))
    return dict(zip(options, (rank for rank, _, _ in best), strict=True))


def best_groups(costs, unique: int):
    """Least total cost of cutting a row into `unique` runs, over all ways to cut; `costs[i][k]`: i to i + k."""
    import itertools

    blocks, best = len(costs), float("inf")
    for cuts in itertools.combinations(range(1, blocks), unique - 1):
        edges = [0, *cuts, blocks]
        runs = [(edges[i], edges[i + 1]) for i in range(unique)]
        if all(end - start <= len(costs[start]) for start, end in runs):
            best = min(best, sum(costs[start][end - start - 1] for start, end in runs))
    return best


def shared_weight(weights, inputs, damping: float):
    """The W of least sum_i ||X_i (W - W_i)^T||^2 / ||X_i W_i^T||^2, drawn to the mean: one least squares problem."""
    scales = [1 / (x.double() @ w.double().T).square().sum() for w, x in zip(weights, inputs, strict=True)]
    rows = [s.sqrt() * x.double() for s, x in zip(scales, inputs, strict=True)]
    wanted = [row @ w.double().T for row, w in zip(rows, weights, strict=True)]
    ridge = damping * sum(row.square().sum() for row in rows) / rows[0].shape[1]
    rows.append(ridge.sqrt() * torch.eye(rows[0].shape[1], dtype=torch.float64))
    wanted.append(ridge.sqrt() * torch.stack(list(weights)).double().mean(0).T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T


def divergence(student, teacher, temperature: float, kind: str, beta: float) -> float:
    """Token by token, in float64: KL(P || Q), KL(Q || P), or beta KL(P || M) + (1 - beta) KL(Q || M)."""

    def kl(p: Tensor, q: Tensor) -> float:
        return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))

    total, rows = 0.0, student.shape[-1]
    for s, t in zip(student.double().reshape(-1, rows), teacher.double().reshape(-1, rows), strict=True):
        q, p = ((x / temperature).exp() / (x / temperature).exp().sum() for x in (s, t))
        m = beta * p + (1 - beta) * q
        total += {"forward": kl(p, q), "reverse": kl(q, p), "js": beta * kl(p, m) + (1 - beta) * kl(q, m)}[
            kind
        ]
    return temperature**2 * total / (student.numel() // rows)


def self_relations(student, teacher, heads: int) -> float:
    """MiniLM's KL between scaled dot-product relations, head by head and token by token, in float64."""
    total, count = 0.0, 0
    for mine, its in zip(student.double(), teacher.double(), strict=True):
        for head in range(heads):
            rows = []
            for x in (its, mine):
                width = x.shape[1] // heads
                x = x[:, head * width : (head + 1) * width]
                rows.append([(x @ token / width**0.5).exp() for token in x])
            for p, q in zip(*rows, strict=True):
                p, q = p / p.sum(), q / q.sum()
                total += float((p * (p / q).log()).sum())
                count += 1
    return total / count


def huber(a: float, b: float) -> float:
    error = abs(a - b)
    return error**2 / 2 if error <= 1 else error - 0.5


def distances(student, teacher) -> float:
    """RKD: Huber loss of pairwise distances over their mean, pair by pair, in float64."""
    pairs = [(i, j) for i in range(len(student)) for j in range(i)]
    found, wanted = ([float((x[i] - x[j]).double().norm()) for i, j in pairs] for x in (student, teacher))
    means = sum(found) / len(pairs), sum(wanted) / len(pairs)
    return sum(huber(a / means[0], b / means[1]) for a, b in zip(found, wanted, strict=True)) / len(pairs)


def angles(student, teacher) -> float:
    """RKD: Huber loss of the cosines at j between i and k, triplet by triplet, in float64."""
    losses = []
    for i in range(len(student)):
        for j in range(len(student)):
            for k in range(len(student)):
                if len({i, j, k}) == 3:
                    cosines = []
                    for x in (student.double(), teacher.double()):
                        a, b = x[i] - x[j], x[k] - x[j]
                        cosines.append(float(a @ b / (a.norm() * b.norm())))
                    losses.append(huber(*cosines))
    return sum(losses) / len(losses)


def nf4(weight, block: int = 64):
    """QLoRA: each weight over the largest of its block to the nearest of the 16 values of its appendix E."""
    values = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    flat = weight.flatten()
    out = flat.clone()
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        scale = max(abs(float(w)) for w in part)
        for i, w in enumerate(part.tolist()):
            out[start + i] = scale * min(values, key=lambda value: abs(value - w / scale))
    return out.reshape(weight.shape)


def pooled_heads(rows, kv_heads: int, head_dim: int):
    """k or v rows [heads * head_dim, ...] with each head at the mean of its group of consecutive heads."""
    heads = list(rows.clone().split(head_dim))
    size = len(heads) // kv_heads
    result = []
    for head in range(len(heads)):
        first = head // size * size
        total = heads[first].double()
        for other in range(first + 1, first + size):
            total = total + heads[other].double()
        result.append((total / size).to(rows.dtype))
    return torch.cat(result)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit packing of a row of n codes by runs: byte j holds code j of every run, the first run lowest."""
    rows, n = codes.shape
    packed = torch.zeros(rows, n * bits // 8, dtype=torch.uint8)
    start, shift = 0, 0
    for width in (2, 1) if bits == 3 else (bits,):
        m = n * width // 8
        for row in range(rows):
            for j in range(n):
                part = int(codes[row, j]) >> shift & (2**width - 1)
                packed[row, start + j % m] += part << (j // m * width)
        start, shift = start + m, shift + width
    return packed


def min_max(x: Tensor, bits: int) -> Tensor:
    """The group x [n] on the grid of 2**bits levels from its least to its greatest number, grid in float16."""
    low = float(x.min().half())
    step = float(((x.max() - x.min()) / (2**bits - 1)).half())
    return torch.tensor([low + step * min(2**bits - 1, max(0, round((float(v) - low) / step))) for v in x])
