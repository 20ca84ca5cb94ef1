"""How lossy the KV of a request may travel: the operator's word, for all or for one tenant."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.wire.wire_format import WireFormat


@dataclass(frozen=True, slots=True)
class WireLoss:
    """The most lossy forms allowed.

    Attributes:
        default: for every tenant that is not in `tenants`.
    """

    default: WireFormat = WireFormat.NATIVE
    tenants: Mapping[str, WireFormat] = field(default_factory=dict[str, WireFormat])

    def allowed(self, tenant: str) -> WireFormat:
        """The most lossy form for requests of `tenant`."""
        return self.tenants.get(tenant, self.default)
