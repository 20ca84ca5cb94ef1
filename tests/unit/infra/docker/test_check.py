import pytest

from infra.docker.check import unready


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"Status": "running", "ExitCode": 0, "Health": {"Status": "healthy"}}, ""),
        ({"Status": "running", "ExitCode": 0}, ""),
        ({"Status": "exited", "ExitCode": 0}, ""),
        ({"Status": "running", "ExitCode": 0, "Health": {"Status": "starting"}}, "starting"),
        ({"Status": "running", "ExitCode": 0, "Health": {"Status": "unhealthy"}}, "unhealthy"),
        ({"Status": "exited", "ExitCode": 1}, "exited with 1"),
        ({"Status": "restarting", "ExitCode": 1}, "restarting with 1"),
        ({"Status": "created", "ExitCode": 0}, "created with 0"),
    ],
)
def test_a_container_is_ready_if_it_is_healthy_or_ended_well(state: dict[str, object], expected: str):
    assert unready(state) == expected
