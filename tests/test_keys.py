"""The server's certificate and key: replaced as a pair, whatever ends that."""

import os
from pathlib import Path

import pytest

from fedapp.deploy import keys


class Killed(BaseException):
    """What no handler of errors holds up."""


@pytest.mark.parametrize("replaced", [0, 1, 2, 3])
def test_renewing_that_is_broken_off_leaves_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """After so many files were replaced, of the three that there are to replace."""
    keys.init(tmp_path, ["a"])
    before = [(tmp_path / name).read_bytes() for name in (keys.CERTIFICATE, keys.KEY)]
    replace, left = os.replace, iter(range(replaced))

    def until(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        if replaced < 3:
            with pytest.raises(Killed):
                keys.renew(tmp_path)
        else:
            keys.renew(tmp_path)
    keys.check(tmp_path)
    after = [(tmp_path / name).read_bytes() for name in (keys.CERTIFICATE, keys.KEY)]
    assert (after == before) == (replaced < 2)
    assert (tmp_path / keys.KEY).stat().st_mode & 0o777 == 0o600
    keys.renew(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("ca.key", "ca.pem", "operator.token", "server.key", "server.pem")
    ]


def test_a_key_without_its_certificate_stays_where_it_is(tmp_path: Path) -> None:
    keys.init(tmp_path / "server", ["a"])
    keys.init(tmp_path / "other", ["a"])
    (tmp_path / "other" / keys.KEY).rename(tmp_path / "server" / keys._NEW_KEY)
    keys.check(tmp_path / "server")
