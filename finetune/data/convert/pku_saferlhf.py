"""PKU-SafeRLHF's JSON lines (Ji et al. 2024, arXiv:2406.15513): two answers to a question, each judged safe or not.

{"prompt": "...", "response_0": "...", "response_1": "...", "is_response_0_safe": true, "is_response_1_safe": false,
 "response_0_harm_category": {"Privacy Violation": false, …}, "response_1_harm_category": {…}}

Exchanges for a guard (`finetune.protector.exchanges`), for `stage: harm_detector` and `stage: detoxifier`. Whether the
question itself is harmful is not known. A file or a folder of .jsonl files, each of which becomes a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detgpt.evaluation import fields
from detgpt.evaluation.readers import Source
from finetune.data.convert import Converted
from finetune.data.convert.beavertails import boolean, judged_parts, kinds
from finetune.data.records import Row
from finetune.protector.exchanges import read_exchange

USES: frozenset[str] = frozenset()
CHECK = read_exchange
HINT = "PKU-SafeRLHF's data is JSON lines with 'prompt', 'response_0', 'response_1' and 'is_response_0_safe' …"


def convert(source: Source) -> Converted:
    return judged_parts(source.path, HINT, _row)


def _row(entry: Mapping[str, Any], where: str) -> Row:
    harmful = [not boolean(entry, f"is_response_{i}_safe", where) for i in (0, 1)]
    about = [kinds(entry.get(f"response_{i}_harm_category", {}), where) for i in (0, 1) if harmful[i]]
    return {
        "question": fields.text(entry, "prompt", where),
        "answers": [fields.text(entry, f"response_{i}", where) for i in (0, 1)],
        "harmful": harmful,
        "categories": sorted(set().union(*about)),
    }
