"""Which assembler is taken for Hopper, and what becomes of calls where the newer one cannot be used."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from attention_oracle import make_arguments
from fused_mha import info
from triton_kernels.kinds import matches_oracle

pytest.importorskip("triton")
assembler = pytest.importorskip("fused_mha.backends.triton.assembler")
launcher = pytest.importorskip("fused_mha.backends.triton.launcher")
preparation = pytest.importorskip("fused_mha.backends.triton.preparation")

WRONG, NEWER = (SimpleNamespace(path=f"/bin/ptxas-{version}", version=version) for version in ("12.8", "12.9"))


class Settings:
    """Triton's, of two assemblers."""

    def __init__(self, ptxas=WRONG, ptxas_blackwell=NEWER):
        self.ptxas, self.ptxas_blackwell = ptxas, ptxas_blackwell

    @contextlib.contextmanager
    def scope(self):
        own = self.ptxas
        yield
        self.ptxas = own


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, of which `takes(settings, load)` makes the choice."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    def takes(settings, load=lambda: None):
        def warmup(grid, **options):
            assert options == {"ptx_options": "-O3"}
            assert settings.ptxas == NEWER.path
            return type("Kernel", (), {"run": property(lambda _: load())})()

        monkeypatch.setattr(assembler.triton.knobs, "nvidia", settings)
        monkeypatch.setattr(assembler, "_nothing", SimpleNamespace(warmup=warmup))
        assembler.of_device.cache_clear()
        return assembler.of_device(0)

    yield takes
    assembler.of_device.cache_clear()


def refuse():
    raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nand more")


def test_the_newer_one_is_taken_around_compilations_alone(hopper):
    settings = Settings()
    found = hopper(settings)
    assert (found.path, found.is_right) == (NEWER.path, True)
    with assembler.used(found) as options:
        assert (settings.ptxas, options) == (NEWER.path, {"ptx_options": "-O3"})
    assert settings.ptxas is WRONG


@pytest.mark.parametrize(
    ("settings", "load", "why"),
    [
        (Settings(), refuse, "the driver refuses the newer one's code (Triton Error [CUDA]: device kernel image"),
        (Settings(ptxas_blackwell=WRONG), None, "it can't be replaced"),
        (SimpleNamespace(ptxas=WRONG), None, "a newer one is not found"),
    ],
    ids=["old driver", "no newer one", "no such setting"],
)
def test_without_a_newer_one_tiles_of_keys_and_values_have_one_width_and_info_says_why(
    hopper, capsys, settings, load, why
):
    found = hopper(settings, load)
    assert (found.path, found.is_right) == (None, False)
    info.main()
    assert why in capsys.readouterr().out
    with assembler.used(found) as options:
        assert options == {}


@pytest.mark.parametrize("own", [NEWER, SimpleNamespace(path="/bin/ptxas", version="13.0")], ids=["12.9", "13.0"])
def test_tritons_own_is_taken_where_it_is_another(hopper, own):
    found = hopper(Settings(ptxas=own))
    assert (found.path, found.is_right) == (None, True)


def test_other_chips_keep_tritons_own():
    assert (assembler.choice(8).path, assembler.choice(8).is_right) == (None, True)


@pytest.mark.parametrize("is_right", [True, False])
def test_tiles_of_one_width_give_the_same(attention, monkeypatch, is_right):
    tiles, run = [], launcher.run
    monkeypatch.setattr(preparation, "_assembler_is_right", lambda _: is_right)
    monkeypatch.setattr(launcher, "run", lambda *arguments: (tiles.append(arguments[-1]), run(*arguments)))
    matches_oracle(attention, make_arguments(N=1, L=5, S=40, H=2, H_kv=1, D=40, D_v=24, dtype=torch.float16))
    assert {tile.BLOCK_D == tile.BLOCK_DV for tile in tiles} == {not is_right}
