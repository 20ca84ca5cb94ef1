"""Every topic, named after the service that reads it; with its partitions and settings. Created at deploy."""

from dataclasses import dataclass

from shared.request import NUM_REQUEST_PARTITIONS, NUM_SLOTS

MAX_DEADLINE_S = 6 * 3600
"""Longest time a job may ask for."""

MAX_RECORD_BYTES = 4 * 1024 * 1024
"""Largest record on any topic; admission keeps requests so small that none of their records gets there."""

RETENTION_MS = (MAX_DEADLINE_S + 3600) * 1000
"""A record is kept for as long as any request that it belongs to may live, and an hour more."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic.

    Attributes:
        public: applications may read or write it; its values keep their meaning.
    """

    name: str
    num_partitions: int
    public: bool = False
    retention_ms: int = RETENTION_MS

    @property
    def config(self) -> dict[str, str]:
        """The broker's settings for it: retention by time only, stamped by the broker's clock.

        The broker unpacks what applications send compressed: our readers know gzip only, and MAX_RECORD_BYTES is of
        what a reader must hold.
        """
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_ms),
            "retention.bytes": "-1",
            "message.timestamp.type": "LogAppendTime",
            "compression.type": "uncompressed",
            "max.message.bytes": str(MAX_RECORD_BYTES),
        }


INGEST = Topic("ingest", NUM_REQUEST_PARTITIONS, public=True)
INGEST_RESUME = Topic("ingest-resume", NUM_REQUEST_PARTITIONS)
PREFILL = Topic("prefill", NUM_SLOTS)
DECODE = Topic("decode", NUM_SLOTS)
STREAM_OUT = Topic("stream-out", NUM_REQUEST_PARTITIONS)
RESULTS = Topic("results", NUM_REQUEST_PARTITIONS, public=True)
DEAD_LETTER = Topic("dead-letter", NUM_REQUEST_PARTITIONS, public=True)

TOPICS: tuple[Topic, ...] = (INGEST, INGEST_RESUME, PREFILL, DECODE, STREAM_OUT, RESULTS, DEAD_LETTER)
