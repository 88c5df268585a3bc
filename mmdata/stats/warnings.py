"""Warnings on figures, in plain words: what a reader should know first."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mmdata.stats.frames import LONGER_BY, OPENING
from mmdata.stats.report.page import percent

# By code; {…} are values. Reports translate the sentences.
WARNINGS = {
    "left out": "{share} of the rows were left out, most of them for: {reason}",
    "cut": "{share} of the tokens were cut to fit the length limit",
    "exact duplicates": "{share} of the rows repeat an earlier row word for word",
    "near duplicates": "{share} of the rows nearly repeat an earlier row",
    "control strings": "{share} of the rows contain control strings; they are packed as plain text",
    "chosen longer": "{share} of the pairs prefer the longer answer by more than {factor}×",
    "length bias": "the chosen answer is the longer one in {share} of the pairs: dpo may learn length",
    "alike": "{share} of the pairs have two answers that are nearly the same",
    "little trained": "only {share} of the tokens are trained on",
    "low fill": "packs are only {share} full",
    "unused vocabulary": "{share} of the vocabulary never occurs in these {tokens} tokens",
    "one opening": "{share} of the texts or answers begin with the same words: {text}",
    "one system": "{share} of the rows share one system prompt",
    "few val rows": "only {number} rows are held out for validation",
    "contained": "{share} of {one} is also in {other}",
}


def warnings(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a reader should know first, as {"code", "values", "text"}; in the order of WARNINGS."""
    return [warning(code, **values) for code, values in _warnings_on(figures)]


def warning(code: str, **values: Any) -> dict[str, Any]:
    """A warning with its English sentence."""
    return {"code": code, "values": values, "text": WARNINGS[code].format(**values)}


def _warnings_on(figures: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    num_rows, kept = max(figures["rows"], 1), max(figures["kept"], 1)
    left_out = figures["left_out"]
    if sum(left_out.values()) > 0.001 * num_rows:
        reason = max(left_out, key=lambda r: left_out[r])
        yield "left out", {"share": percent(sum(left_out.values()) / num_rows), "reason": reason}
    if sum(figures.get("cut", {}).values()) > 0.001 * max(figures.get("tokens_in", 0), 1):
        yield "cut", {"share": percent(sum(figures["cut"].values()) / figures["tokens_in"])}
    repeated = figures.get("duplicates") or {"exact": 0, "near": 0, "rows": 0}
    if repeated["exact"] > 0.001 * kept:
        yield "exact duplicates", {"share": percent(repeated["exact"] / repeated["rows"])}
    if (repeated["near"] or 0) > 0.005 * kept:
        yield "near duplicates", {"share": percent(repeated["near"] / repeated["rows_compared"])}
    if figures.get("rows_with_control"):
        yield "control strings", {"share": percent(figures["rows_with_control"] / figures["text_rows"])}
    yield from _pair_warnings(figures.get("pairs"))
    if figures.get("tokens") and figures["kind"] == "conversation" and figures["trained_share"] < 0.2:
        yield "little trained", {"share": percent(figures["trained_share"])}
    if figures["kind"] != "pair" and figures.get("fill", 1) < 0.9:
        yield "low fill", {"share": percent(figures["fill"])}
    used = figures.get("vocabulary")
    if used and used["counted"] >= 100 * used["size"] and used["never"] > 0.02 * used["size"]:
        yield (
            "unused vocabulary",
            {"share": percent(used["never"] / used["size"]), "tokens": f"{used['counted']:,}"},
        )
    if figures.get("openings") and figures["openings"][0]["count"] > 0.02 * figures["text_rows"]:
        top = figures["openings"][0]
        text = f"“{top['text']}{'…' if len(top['text']) == OPENING else ''}”"
        yield "one opening", {"share": percent(top["count"] / figures["text_rows"]), "text": text}
    if "val_rows" in figures and figures["val_rows"] < 20 and kept > 200:
        yield "few val rows", {"number": figures["val_rows"]}


def _pair_warnings(pairs: Mapping[str, Any] | None) -> Iterable[tuple[str, dict[str, Any]]]:
    if not pairs or not pairs["pairs"]:
        return
    number, longer = pairs["pairs"], Counter(pairs["longer"])
    if longer["chosen by 3"] > 0.02 * number:
        share = percent(longer["chosen by 3"] / number)
        yield "chosen longer", {"share": share, "factor": LONGER_BY}
    if longer["chosen"] > 0.6 * number:
        yield "length bias", {"share": percent(longer["chosen"] / number)}
    if sum(pairs["similarity"][9:]) > 0.01 * number:
        yield "alike", {"share": percent(sum(pairs["similarity"][9:]) / number)}
