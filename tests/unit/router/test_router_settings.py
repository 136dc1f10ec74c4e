"""What an ingress is told must not end up in logs."""

from router.settings import IngressSettings


def test_the_secret_is_not_shown() -> None:
    """Settings are shown in tracebacks and by frameworks that they pass."""
    settings = IngressSettings(
        model="m",
        served_names=("m",),
        engine={},
        host="127.0.0.1",
        replica_host="127.0.0.1",
        port=8000,
        secret=b"not to be seen",
        wanted={"prefill": 1, "decode": 1},
    )
    for shown in (repr(settings), str(settings), f"{[settings]}"):
        assert "not to be seen" not in shown
        assert "8000" in shown
