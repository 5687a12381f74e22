"""A frozen module of the user as encoder: what is refused, and what it is allowed to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.models.encoder import Encoder
from streamlearn.learning.tensors import make_preprocess
from tests.support.refusals import refused

CPU = torch.device("cpu")


class Halved(nn.Module):
    """Works in place, as `nn.ReLU(inplace=True)` does, and in inference mode, as frozen modules often do."""

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """Return half of `x`."""
        x *= 0.5
        return x


class Other(nn.Module):
    """Returns a fixed value."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        """Return the fixed value, on the device of `x`."""
        del x
        return self.made


def halved(_: list[int]) -> nn.Module:
    """Build an encoder that works in place."""
    return Halved()


def scripted(shape: list[int]) -> nn.Module:
    """Build a frozen TorchScript module."""
    made: nn.Module = torch.jit.script(nn.Linear(shape[0], 2))
    return made


class More(nn.Linear):
    """Has state that is not a tensor, as quantized modules have."""

    def get_extra_state(self) -> dict[str, int]:
        """Return a dict of integers."""
        return {"bits": 8}


def more(shape: list[int]) -> nn.Module:
    """Build an encoder with state that is not a tensor."""
    return More(shape[0], 2)


def scalars(_: list[int]) -> nn.Module:
    """Build an encoder that returns a number for each sample, without a feature dimension."""
    return Other(torch.zeros(2))


def one_number(_: list[int]) -> nn.Module:
    """Build an encoder that returns one number for the batch."""
    return Other(torch.zeros(()))


def doubles(_: list[int]) -> nn.Module:
    """Build an encoder that returns float64."""
    return Other(torch.zeros(2, 3, dtype=torch.float64))


def one_row(_: list[int]) -> nn.Module:
    """Build an encoder that returns one row too few."""
    return Other(torch.zeros(1, 3))


def nowhere(_: list[int]) -> nn.Module:
    """Build an encoder with NaN weights."""
    encoder = nn.Linear(4, 3)
    nn.init.constant_(encoder.bias, torch.nan)
    return encoder


def pair(_: list[int]) -> nn.Module:
    """Build an encoder that returns a pair."""
    return Other((torch.zeros(2, 3), torch.zeros(2, 3)))


def narrow(shape: list[int]) -> nn.Module:
    """Build an encoder for other inputs."""
    return nn.Linear(shape[0] - 1, 2)


def no_module(_: list[int]) -> object:
    """Return an object that is not a module."""
    return 3


def build(name: str, **options: Any) -> Encoder:
    """Build one of the encoders above, or the one with this full name."""
    full = name if ":" in name else f"{__name__}:{name}"
    return Encoder.build({"name": full, "options": options}, [4], 5, CPU)


WRONG: list[tuple[str, str]] = [
    ("scalars", r"the output for two samples must be float32 of shape \[2, \.\.\.\], and is torch\.float32 \[2\]$"),
    ("one_number", r"and is torch\.float32 \[\]$"),
    ("doubles", r"and is torch\.float64 \[2, 3\]$"),
    ("one_row", r"and is torch\.float32 \[1, 3\]$"),
    ("pair", r"and is tuple$"),
    ("nowhere", r"parameter bias is not finite$"),
    ("narrow", r"the forward pass of a batch of shape \[2, 4\] failed: RuntimeError: "),
    ("no_module", r"expected a torch\.nn\.Module, got int$"),
    ("absent", r"AttributeError: "),
    ("no_such_package:function", r"ModuleNotFoundError: "),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_an_unusable_encoder_is_refused(name: str, message: str) -> None:
    """One line names the encoder and the failure; the exit code is 78."""
    with refused("input.encoder ", message):
        build(name)


class Restored(More):
    """Can load the state that is not a tensor."""

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Accept the value of `get_extra_state`."""
        assert state == {"bits": 8}


def restored(shape: list[int]) -> nn.Module:
    """Build an encoder that can load its state."""
    return Restored(shape[0], 2)


class Single(nn.Linear):
    """Drops the dimension of a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features without dimensions of size 1."""
        return super().forward(x).squeeze()


def single(shape: list[int]) -> nn.Module:
    """Build an encoder that returns another shape for one sample."""
    return Single(shape[0], 3)


def test_an_encoder_must_accept_single_samples() -> None:
    """A batch may have one sample, so an encoder that returns another shape for it is refused at the start."""
    with refused("input.encoder ", r"the output for one sample must have shape \[1, 3\], and has \[3\]$"):
        build("single")


def test_the_state_of_an_encoder_is_saved_and_loaded_at_the_start() -> None:
    """State that is not a tensor is saved, too; a module that cannot load it is refused."""
    build("restored").check_state()
    with refused("input.encoder ", "its state cannot be saved and loaded: RuntimeError: "):
        build("more").check_state()


def test_an_encoder_is_frozen() -> None:
    """It does not learn, its statistics stay, one seed gives one encoder, and no global generator advances."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other = (build("tests.support.models:encoder", features=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert one.shape == (3,)
    assert not any(part.training for part in one.module.modules())
    assert not any(param.requires_grad for param in one.module.parameters())
    before = {name: value.clone() for name, value in one.module.state_dict().items()}
    one(torch.rand(8, 4))
    after = one.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(torch.equal(value, other.module.state_dict()[name]) for name, value in before.items())


def test_an_encoder_does_not_change_stored_samples() -> None:
    """A module that writes into its input changes no sample, and features made in inference mode can be used for training."""
    scale = make_preprocess(1.0, CPU, encoder=build("halved"))
    x = torch.ones(2, 4)
    features = scale(x)
    assert torch.equal(x, torch.ones(2, 4))
    assert torch.equal(features, torch.full((2, 4), 0.5))
    head = nn.Linear(4, 1)
    head(features).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, but many saved models use it
def test_a_scripted_module_can_be_an_encoder() -> None:
    """It has no method `requires_grad_`, and is frozen nevertheless."""
    made = build("scripted")
    assert made.shape == (2,)
    assert not made(torch.rand(3, 4)).requires_grad


def test_saved_weights_must_fit_the_encoder() -> None:
    """One line reports that the user's function builds another kind of module by now."""
    saved = build("tests.support.models:encoder", features=3).module.state_dict()
    changed = build("tests.support.models:encoder", features=5)
    with refused("input.encoder ", "the saved weights do not fit: RuntimeError: "):
        changed.load(saved)


def test_out_of_memory_is_not_an_error_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the device is full the start ends with 75, and a supervisor tries again."""

    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("streamlearn.learning.models.encoder._freeze", full)
    with pytest.raises(StreamlearnError, match="out of memory: ") as caught:
        build("halved")
    assert caught.value.exit_code == 75
