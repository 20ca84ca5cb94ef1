"""Settings of ingest, from the environment."""

from pydantic import Field

from shared.runtime.settings import ServiceSettings
from shared.wire.topics import MAX_DEADLINE_S


class IngestProcessSettings(ServiceSettings):
    """BATON_* variables of ingest.

    Attributes:
        default_deadline_s: for jobs that name none.
    """

    default_deadline_s: float = Field(default=600.0, gt=0, le=MAX_DEADLINE_S)
