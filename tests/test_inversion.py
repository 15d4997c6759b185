"""Gradient inversion: an update gives its image away, noise keeps it, and the page shows both."""

import re
from base64 import b64decode
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedapp.audit import command, inversion
from fedapp.audit.inversion import NOTHING, Attack, attack, protections
from fedapp.errors import ConfigError
from fedapp.tasks.images import Digits

OPEN, CODED, NOISED = "no protection", "1 bit codec", "DP, epsilon 8"
SETTINGS = {"task": "digits", "model": "logistic", "privacy.test_seed": "0"}
SMALL = ["task=digits", "rounds=2", "model=mlp", "trainer.steps=5", "canaries=1000"]


@pytest.fixture(scope="module")
def found() -> Attack:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "SOUGHT", 30)
        return attack(protections(SETTINGS, 8.0), steps=150)


def test_an_update_gives_its_image_away_coded_too_and_noise_keeps_it(found: Attack) -> None:
    assert list(found.rows) == [OPEN, CODED, NOISED, NOTHING]
    guess = found.rows[NOTHING].psnr  # what is known without any update
    assert (found.rows[OPEN].psnr > guess + 10).all()
    assert found.rows[CODED].psnr.mean() > guess.mean() + 3
    assert (found.rows[NOISED].psnr < guess).all()


def test_who_holds_the_examples_picks_the_right_one_but_for_noise(found: Attack) -> None:
    assert found.rows[OPEN].picked == found.rows[OPEN].labelled == 1
    noised = found.rows[NOISED]
    assert noised.picked is not None
    assert noised.labelled is not None
    assert noised.picked <= 0.1
    assert noised.picked <= noised.labelled < 1
    assert found.rows[NOTHING].picked is None


def test_noise_is_what_keeps_it() -> None:
    """The same step of DP-SGD under a budget that asks for next to no noise gives the image away."""
    name, noised = list(protections(SETTINGS, 1000.0).items())[2]
    rows = attack({name: noised}, steps=150).rows
    assert name == "DP, epsilon 1e+03"
    assert (rows[name].psnr > rows[NOTHING].psnr + 5).all()
    assert rows[name].picked == 1


@pytest.mark.parametrize("privacy", ["local_gaussian", "distributed_example"])
def test_an_attack_on_what_no_server_sees_of_a_client_is_refused(privacy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"got privacy={privacy}: leave it out, or set privacy=example"):
        command.run(["attack=true", f"privacy={privacy}", f"run_dir={tmp_path}"])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("attack=perhaps", "attack must be true or false, got 'perhaps'"),
        ("task=fashion_mnist", r"shape \(17, 7, 7\): set task.features=pixels"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(given: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        command.run(["attack=true", f"run_dir={tmp_path}", given])


def test_a_page_shows_claim_bound_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inversion, "SOUGHT", 5)
    monkeypatch.setattr(command, "attack", partial(attack, steps=2))
    finding = command.run([*SMALL, "attack=true", f"run_dir={tmp_path / 'audit'}"])
    page = (tmp_path / "audit" / "report.html").read_text()
    said = command.told(finding)
    assert said in capsys.readouterr().out
    assert said.splitlines()[1] in page
    assert all(word in page for word in ("claimed epsilon", "lower bound", "no protection", "DP, epsilon 2"))
    assert not re.search(r"https?:|<script|<link|@import|url\(|\bnan\b|\binf\b|None", page)
    pictures = [b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(pictures) == 5 * 10  # the images, three protections, and the mean image
    shown = torch.from_numpy(np.array(Image.open(BytesIO(pictures[0])))[::14, ::14])
    task = protections(SETTINGS, 8.0)[OPEN].task
    assert isinstance(task, Digits)
    examples = task.train_data()
    zeros = (255 * examples.x[examples.y == 0, 0]).round()
    assert shown.shape == (8, 8)
    assert (zeros == shown).all((1, 2)).any()


def test_without_an_attack_nothing_is_left(tmp_path: Path) -> None:
    command.run([*SMALL, f"run_dir={tmp_path / 'audit'}"])
    assert not (tmp_path / "audit").exists()
