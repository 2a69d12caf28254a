"""The pytest plugin: ``spfs.testing`` as fixtures. Nothing of it is imported before a test asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Generator, Iterator, List, Optional

import pytest

if TYPE_CHECKING:
    from spfs.testing import DelayedMount, MountServer

_MISSING = ("skip", "fail")
_LOG_LINES = 30  # of a mount's log in the report of a failing test
_OPEN = pytest.StashKey[List["_Factory"]]()


class _Factory:
    """What the fixtures give: called, it makes a mount. Its mounts end with the fixture."""

    def __init__(self, server: "MountServer", settings: "_Settings") -> None:
        self._server = server
        self._settings = settings
        self.mounts: List["DelayedMount"] = []

    def __repr__(self) -> str:
        return f"<delayed_mount: {self.mounts}>"

    def __call__(self, *arguments: Any, **keywords: Any) -> "DelayedMount":
        """Arguments as of ``spfs.testing.MountServer.mount``."""
        from spfs.testing import MissingFeatureError

        if self._settings.own_limit is not None:
            keywords.setdefault("own_limit", self._settings.own_limit)
        try:
            mount = self._server.mount(*arguments, **keywords)
        except MissingFeatureError as error:
            reason = f"delayed mounts cannot be had here: {error}"
            if self._settings.missing == "fail":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        self.mounts.append(mount)
        return mount

    def close(self) -> None:
        failure: Optional[Exception] = None
        for mount in reversed(self.mounts):
            try:
                mount.close()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


class _Settings:
    """The command line is stronger than a mark, a mark than the ini file."""

    def __init__(self, config: pytest.Config, mark: Optional[pytest.Mark]) -> None:
        given = dict(mark.kwargs) if mark is not None else {}
        missing = config.getoption("delayed_mount_missing") or given.pop("missing", None)
        self.missing = missing or config.getini("delayed_mount_missing") or "skip"
        limit = given.pop("own_limit", None) or config.getini("delayed_mount_own_limit")
        try:
            self.own_limit = float(limit) if limit else None
        except ValueError:
            raise pytest.UsageError(f"delayed_mount_own_limit: {limit}: not a number of seconds") from None
        if self.missing not in _MISSING:
            raise pytest.UsageError(f"delayed_mount_missing: {self.missing}: not one of {', '.join(_MISSING)}")
        given.pop("missing", None)
        if given or (mark is not None and mark.args):
            raise pytest.UsageError("mark delayed_mount: takes missing= and own_limit=, and nothing else")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "where FUSE cannot be had, tests with delayed mounts: skip (with the reason; default) or fail"
    group = parser.getgroup("delayed mounts")
    group.addoption("--delayed-mount-missing", choices=_MISSING, default=None, help=text)
    parser.addini("delayed_mount_missing", text)
    parser.addini(
        "delayed_mount_own_limit", "seconds after which the test itself gets ETIMEDOUT from a mount that hangs"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "delayed_mount(missing, own_limit): for the fixture delayed_mount, in place of the ini options"
    )


@pytest.fixture(scope="session")
def delayed_mount_server() -> Iterator["MountServer"]:
    """The process that makes the mounts of the session; started by the first one."""
    from spfs.testing import MountServer

    with MountServer() as server:
        yield server


@pytest.fixture(scope="session")
def delayed_mount_session(
    request: pytest.FixtureRequest, delayed_mount_server: "MountServer", tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., "DelayedMount"]]:
    """As delayed_mount, for mounts that last until the end of the session."""
    yield from _factory(request, delayed_mount_server)


# Depends on tmp_path only to be torn down before it: nobody may look into a directory with a mount that hangs.
@pytest.fixture
def delayed_mount(
    request: pytest.FixtureRequest, delayed_mount_server: "MountServer", tmp_path: object
) -> Iterator[Callable[..., "DelayedMount"]]:
    """Makes mounts that can hang, fail and be late: ``mount = delayed_mount()``. They end with the test."""
    yield from _factory(request, delayed_mount_server)


def _factory(request: pytest.FixtureRequest, server: "MountServer") -> Iterator[_Factory]:
    mark = request.node.get_closest_marker("delayed_mount")
    factory = _Factory(server, _Settings(request.config, mark))
    opened = request.config.stash.setdefault(_OPEN, [])
    opened.append(factory)
    try:
        yield factory
    finally:
        opened.remove(factory)
        factory.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    if report.failed and {"delayed_mount", "delayed_mount_session"} & set(getattr(item, "fixturenames", ())):
        for factory in item.config.stash.get(_OPEN, []):
            for mount in factory.mounts:
                if not mount.closed:
                    report.sections.append((f"delayed mount {mount.path}", _described(mount)))


def _described(mount: "DelayedMount") -> str:
    from spfs.testing import StubfsError

    lines: List[str] = []
    try:
        status = mount.status()
        lines.append(f"mode {status.mode}, requests held: {status.held}, files open: {status.handles}")
        lines += [f"rule: {rule}" for rule in mount.rules]
        lines += [f"held: {request}" for request in mount.held()]
    except StubfsError as error:
        lines.append(str(error))
    lines += [f"log: {line}" for line in mount.log().splitlines()[-_LOG_LINES:]]
    return "\n".join(lines)
