import pytest
import torch

from arvision.kernels.philox import philox4x32

pytestmark = pytest.mark.usefixtures("_poisoned")


def test_known_answers(device):
    known = torch.tensor(
        [
            [0, 0, 0, 0, 0, 0],
            [0xFFFFFFFF] * 6,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
        ],
        device=device,
    )
    columns = known.unbind(1)
    words = philox4x32(columns[:4], columns[4:], backend="triton")
    assert words.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 5, 7), (1025,)], ids=str)
def test_broadcast_words_equal_the_reference(device, shape):
    c = [torch.randint(1 << 32, shape, device=device) for _ in range(3)]
    one = torch.tensor(5, device=device)
    key = (torch.randint(1 << 32, shape[:1] + (1,) * (len(shape) - 1), device=device), one)
    counter = (c[0], one, c[1], c[2])
    ours = philox4x32(counter, key, backend="triton")
    assert ours.equal(philox4x32(counter, key, backend="reference"))
