"""Shows in metrics what an engine counts, and what was measured of it."""

from shared.engine.port import EngineStats
from shared.observe.metrics import WorkerMetrics
from shared.worker.speeds import SpeedMeter


class EngineFigures:
    """What was shown last, so that counters grow by what came since."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._last = EngineStats(
            num_pages=0, num_free_pages=0, num_waiting=0, num_running=0, num_held=0, num_importing=0
        )

    def show(self, stats: EngineStats, speeds: SpeedMeter) -> None:
        metrics, last = self._metrics, self._last
        metrics.num_running.set(stats.num_running)
        metrics.num_waiting.set(stats.num_waiting)
        metrics.kv_usage.set(1 - stats.num_free_pages / stats.num_pages)
        metrics.free_pages.set(stats.num_free_pages)
        metrics.total_pages.set(stats.num_pages)
        metrics.held_requests.set(stats.num_held)
        metrics.preemptions.inc(stats.num_preemptions - last.num_preemptions)
        metrics.prefix_queries.inc(stats.num_prefix_queries - last.num_prefix_queries)
        metrics.prefix_hits.inc(stats.num_prefix_hits - last.num_prefix_hits)
        metrics.host_pages.set(stats.num_host_pages)
        metrics.host_hits.inc(stats.num_host_hits - last.num_host_hits)
        metrics.lost_blocks.inc(stats.num_lost_blocks - last.num_lost_blocks)
        metrics.saved_bytes.inc(stats.num_saved_bytes - last.num_saved_bytes)
        metrics.restored_bytes.inc(stats.num_restored_bytes - last.num_restored_bytes)
        metrics.prompt_tokens.inc(stats.num_prompt_tokens - last.num_prompt_tokens)
        metrics.generation_tokens.inc(stats.num_generated_tokens - last.num_generated_tokens)
        self._last = stats
        if speeds.profile is not None:
            metrics.speed_error.set(speeds.scatter)
            for name, gauge in metrics.speeds.items():
                gauge.set(getattr(speeds.profile, f"{name}_s"))
