"""RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them; every split becomes a folder of its own.

SOURCE, --annotations and --images are as in `detgpt eval` (see `detgpt.evaluation.readers.refcoco`). A sentence such as
"the man on the left" tells one of several apart, so it is itself the name of the target: the category would say that
the others fit as well.
"""

from __future__ import annotations

from dataclasses import replace

from detgpt.evaluation.data import Record
from detgpt.evaluation.readers import Source
from detgpt.evaluation.readers.folder import to_row
from detgpt.evaluation.readers.refcoco import open_refs, records_of
from detgpt.names import MAX_NAME_LENGTH
from finetune.data.convert import Converted

USES = frozenset({"annotations", "images"})


def convert(source: Source) -> Converted:
    refs, annotations, folder, file = open_refs(source)
    converted = Converted({}, list(annotations.notes))
    too_long = 0
    for split in dict.fromkeys(str(ref.get("split")) for ref in refs):
        records = list(records_of([ref for ref in refs if str(ref.get("split")) == split], annotations, folder, file))
        usable = [record for record in records if len(record.instruction) <= MAX_NAME_LENGTH]
        too_long += len(records) - len(usable)
        converted.parts[split] = [to_row(_named_by_its_sentence(record), str(record.image)) for record in usable]
    if too_long:
        converted.notes.append(f"{too_long} sentences have over {MAX_NAME_LENGTH} characters and were left out.")
    return converted


def _named_by_its_sentence(record: Record) -> Record:
    name = (record.instruction,)
    return replace(record, targets=name, labels=name, present=(*dict.fromkeys((*record.present, *name)),))
