"""Reads a saved result back: the JSON of `--save-result --save-detailed`, as records that can be measured again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadgen.measure import Record, Slo
from loadgen.schedule import ScheduledRow
from shared.errors import StartupError
from shared.request import Event

METADATA_PREFIX = "metadata_"

Count = Annotated[int, Field(ge=0)]


class _Saved(BaseModel):
    """JSON of ours: names that are not known here are left alone, so that later versions can add some."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class SavedRequest(_Saved):
    """One row of the schedule and what became of it; see `loadgen.measure.Record`."""

    row: Count
    trace_index: Count
    bucket: str
    detail: str
    intended_s: Annotated[float, Field(ge=0)]
    sent_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    answered_s: float | None
    ended_s: float | None
    gaps_s: tuple[float, ...]
    input_tokens: Count
    prompt_tokens: Count | None
    served_prompt_tokens: Count | None
    cached_tokens: Count | None
    wanted_output_tokens: Count
    output_tokens: Count | None
    finish_reason: str | None
    timings: Mapping[Event, float]

    def record(self) -> Record:
        """The record as it was measured, but for the blocks that its prompt was made of."""
        return Record(
            row=ScheduledRow(
                row=self.row,
                trace_index=self.trace_index,
                at_us=round(self.intended_s * 1e6),
                input_tokens=self.input_tokens,
                output_tokens=self.wanted_output_tokens,
                blocks=(),
            ),
            bucket=self.bucket,
            detail=self.detail,
            prompt_tokens=self.prompt_tokens,
            sent_s=self.sent_s,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            answered_s=self.answered_s,
            ended_s=self.ended_s,
            gaps_s=self.gaps_s,
            served_prompt_tokens=self.served_prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            finish_reason=self.finish_reason,
            stamps=self.timings,
        )


class SavedLimits(_Saved):
    """The limits in milliseconds under the names of the option `--goodput`."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None


class SavedResult(_Saved):
    """A run with all its requests; see `loadgen.report.Run`.

    Attributes:
        started_unix: start of the run, the origin of its times, in unix seconds.
        duration: seconds from there to the end of the last row.
        metadata: what `--metadata` gave.
    """

    date: str
    started_unix: float
    backend: str
    server: str
    endpoint: str
    client: str
    model_id: str
    prompts: str
    trace: str
    run_id: str
    seed: int
    schedule_sha256: str
    rows: tuple[int, int | None] | None
    window: tuple[float, float | None] | None
    arrivals: str
    request_rate: float | None
    burstiness: float
    speed: float
    jitter_ticks: bool
    length_scale: float
    max_input: int | None
    max_output: int | None
    schedule_span: float
    scheduled_shared_input_tokens: Count
    duration: Annotated[float, Field(ge=0)]
    goodput_config: SavedLimits
    notes: tuple[str, ...]
    metadata: Mapping[str, str]
    requests: tuple[SavedRequest, ...]

    @model_validator(mode="before")
    @classmethod
    def _gather_metadata(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        named = {name: value for name, value in fields.items() if name.startswith(METADATA_PREFIX)}
        return fields | {"metadata": {name.removeprefix(METADATA_PREFIX): value for name, value in named.items()}}

    @property
    def slo(self) -> Slo:
        limits = self.goodput_config
        return Slo(ttft_ms=limits.ttft, tpot_ms=limits.tpot, e2el_ms=limits.e2el)

    def records(self) -> list[Record]:
        """All rows in the schedule's order."""
        return [request.record() for request in self.requests]


def read_saved(path: Path) -> SavedResult:
    """The result in the file at `path`. Raises StartupError for what is no detailed result of `loadgen replay`."""
    try:
        return parse_saved(path.read_bytes())
    except OSError as error:
        raise StartupError(f"cannot read the result {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if place == "requests" and first["type"] == "missing":
            raise StartupError(f"{path} lists no requests: save it with --save-result --save-detailed") from error
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        raise StartupError(f"{path} is no result of `loadgen replay`: {problem}") from error


def parse_saved(content: bytes) -> SavedResult:
    """The result in `content`. Raises pydantic's ValidationError."""
    return SavedResult.model_validate_json(content)
