"""What the simulator knows of a kind of worker and of the path to it: a profile file, read and checked."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import StartupError
from shared.policy.profile import LinkRate, SpeedProfile

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkerKind(_Strict):
    """The workers of one role.

    Attributes:
        num_pages: of the GPU's cache, 64 tokens each.
        num_host_pages: of the host tier behind it; 0 for none.
        max_running: requests it runs at once.
        max_batch_tokens: token rows of one step.
    """

    speeds: SpeedProfile
    num_pages: Annotated[int, Field(ge=2)]
    num_host_pages: Annotated[int, Field(ge=0)] = 0
    max_running: Annotated[int, Field(ge=1)]
    max_batch_tokens: Annotated[int, Field(ge=64)]


class Hops(_Strict):
    """What messages take, in seconds; none waits for another.

    Attributes:
        placed_s: from the send of a request until it stands in the backlog, ready to be placed.
        work_s: from a placement until the worker has the work.
        token_s: from a first token until the decode worker may go on behind it.
        frame_s: from a token until the client has it.
        feed_s: from a change of a worker's cache until placements know of it.
    """

    placed_s: Seconds
    work_s: Seconds
    token_s: Seconds
    frame_s: Seconds
    feed_s: Seconds


class Hardware(_Strict):
    """A profile file.

    Attributes:
        source: where the figures come from.
        page_bytes: of one page of KV.
        peer_link: what a worker pulls KV over, from any peer; it serves one pull after another.
        host_link: between a worker's GPU and its host tier, likewise.
    """

    name: str
    source: str
    max_context: Annotated[int, Field(ge=64)]
    page_bytes: Annotated[int, Field(ge=1)]
    prefill: WorkerKind
    decode: WorkerKind
    peer_link: LinkRate
    host_link: LinkRate
    hops: Hops

    @classmethod
    def read(cls, name_or_path: str) -> Self:
        """A profile that comes with the simulator, by name, or any file. Raises StartupError naming the field."""
        shipped = files("loadgen.simulator") / "profiles" / f"{name_or_path}.json"
        path = Path(name_or_path)
        try:
            text = shipped.read_text() if shipped.is_file() else path.read_text()
        except OSError as error:
            raise StartupError(f"--profile {name_or_path}: neither a profile known here nor a file: {error}") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise StartupError(f"--profile {name_or_path}: {place}: {first['msg']}") from error
