"""Settings of ingest, from the environment."""

from pathlib import Path

from pydantic import Field, Json

from services.ingest.wire_loss import WireLoss
from shared.policy.placement import Rules
from shared.runtime.settings import KafkaSettings, ServiceSettings
from shared.wire.topics import MAX_DEADLINE_S
from shared.wire.wire_format import WireFormat


class IngestProcessSettings(ServiceSettings):
    """BATON_* variables of ingest.

    Attributes:
        default_deadline_s: for jobs that name none.
        ttft_goal_s: time to the first token within which a request counts as served well: what placements aim at.
        tpot_goal_s: mean time of each later token, likewise.
        local_prefill: a decode worker computes a prompt itself where that is predicted to serve all better; without
            it every prompt is handed over.
        max_wire_loss: the most lossy form in which KV may travel, used only where it would come late as it is:
            "native" (exact), "int8" or "int4".
        cache_salt_file: of a secret of the deployment, the same for each of its ingest processes: see `CacheSalt`.
        tenant_max_wire_loss: the same for single tenants, whatever `max_wire_loss` says: JSON, {"tenant": "int8"}.
    """

    default_deadline_s: float = Field(default=600.0, gt=0, le=MAX_DEADLINE_S)
    ttft_goal_s: float = Field(default=2.0, gt=0)
    tpot_goal_s: float = Field(default=0.1, gt=0)
    local_prefill: bool = True
    cache_salt_file: Path | None = None
    max_wire_loss: WireFormat = WireFormat.NATIVE
    tenant_max_wire_loss: Json[dict[str, WireFormat]] = Field(
        default_factory=dict[str, WireFormat],
        validate_default=False,  # it is no JSON
    )

    @property
    def rules(self) -> Rules:
        return Rules(self.ttft_goal_s, self.tpot_goal_s, local_prefill=self.local_prefill)

    @property
    def wire_loss(self) -> WireLoss:
        return WireLoss(self.max_wire_loss, self.tenant_max_wire_loss)


class ToolSettings(KafkaSettings):
    """What the commands need of it: the log and nothing else. `kafka` as for services."""

    kafka: str = "127.0.0.1:9092"
