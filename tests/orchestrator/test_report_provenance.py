"""What the report says of where its numbers come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from orchestrator.report.sections import provenance
from orchestrator.stage import Status
from tests.orchestrator import synthetic


def test_texts_that_were_read_are_named_by_their_digests(tmp_path: Path) -> None:
    result = synthetic.sweep(tmp_path, methods=("rtn", "gptq"), schemes=("w4a16_g64",), wait=[("gptq", "w4a16_g64")])
    digests = {k: synthetic.key_of("text", s.kind, s.status.value) for k, s in result.stages.items()}
    stages = {k: replace(s, spec={**s.spec, "task": {"text": {"digest": digests[k]}}}) for k, s in result.stages.items()}
    assert {s.status for s in stages.values()} == {Status.SUCCEEDED, Status.PENDING}
    page = str(provenance(replace(result, stages=stages)))
    for key, stage in stages.items():
        assert (digests[key] in page) is (stage.status is Status.SUCCEEDED)
