"""Settings that every service shares, read from the environment (`BATON_*`)."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import StartupError


class ServiceSettings(BaseSettings):
    """Where the outside systems are, and where this process answers.

    Attributes:
        kafka: bootstrap address, "host:port".
        redis: URL, "redis://host:port".
        model: the model's folder (Hugging Face layout).
        model_name: what clients call it; the folder's name if not set.
        http_host, http_port: health and metrics, for the edge also the API.
    """

    model_config = SettingsConfigDict(env_prefix="BATON_", frozen=True, protected_namespaces=())

    kafka: str = "127.0.0.1:9092"
    redis: str = "redis://127.0.0.1:6379"
    model: Path
    model_name: str = ""
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=65535)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")

    @property
    def served_model(self) -> str:
        return self.model_name or self.model.resolve().name

    @classmethod
    def read(cls) -> Self:
        """Read the environment. Raises StartupError, naming the variable that is missing or wrong."""
        try:
            return cls()  # pyright: ignore[reportCallIssue] - the environment gives the rest
        except ValidationError as error:
            raise StartupError("; ".join(_problem(each["loc"], each["msg"]) for each in error.errors())) from error


def _problem(location: tuple[int | str, ...], message: str) -> str:
    """What is wrong with one variable, or (no location) with several together, which the message names."""
    return f"BATON_{'_'.join(map(str, location)).upper()}: {message}" if location else message
