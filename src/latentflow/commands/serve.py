"""`latentflow serve`: a model behind HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from latentflow.errors import ConfigError
from latentflow.runtime import Runtime
from latentflow.studio.request import ServeRequest

_LIBRARIES = ("fastapi", "uvicorn", "multipart")


def serve(model: str | Path, request: ServeRequest, *, runtime: Runtime | None = None) -> None:
    """Serve a model until the process gets SIGTERM or SIGINT.

    Raises:
        ConfigError: a library is missing, or the address cannot be listened on.
        ArtifactError: there is no such model.
    """
    require_libraries()
    from latentflow.studio.listening import serve as run

    run(model, request, runtime=runtime)


def require_libraries() -> None:
    """Refuse to go on without the libraries of the extra `studio`.

    Raises:
        ConfigError: with the command that installs them.
    """
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise ConfigError(f"serving needs {missing[0]}, which is not installed: pip install 'latentflow[studio]'")
