"""Settings of a decode worker, from the environment."""

from typing import ClassVar

from shared.worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """As every worker's, but for shorter steps on a GPU: a prompt whose KV could not be pulled is prefilled beside the
    running requests, and each of them waits for the end of the step."""

    cuda_defaults: ClassVar[dict[str, object]] = WorkerSettings.cuda_defaults | {"max_batch_tokens": 2048}
