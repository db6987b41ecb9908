"""What stands in for a GPU notices the mistakes that a GPU would not forgive."""

import ctypes

import pytest

from tests.cuda.emulated import compile_on_host, needs_compiler

pytestmark = needs_compiler

SOURCE = """
#include "cuda/device.cuh"
const char* emulation_error();
namespace fastmmkd::cuda {
struct Values { float at[64]; };
__global__ void mirror(float* out, bool waits) {
  FASTMMKD_SHARED(values, Values);
  values.at[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (waits) __syncthreads();
  out[threadIdx.x] = values.at[63 - threadIdx.x];
}
__global__ void leave_early() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}
__global__ void leave_a_shuffle() {
  if (threadIdx.x == 40) return;
  lane_sum(1.0f);
}
__global__ void meet_elsewhere() {
  if (threadIdx.x % 32 == 7) __syncwarp(); else __ballot_sync(ALL_LANES, true);
}
__global__ void write_beyond() {
  FASTMMKD_SHARED(values, Values);
  values.at[threadIdx.x + 1] = 0.0f;
}
}
extern "C" const char* run(int which, float* out) {
  using namespace fastmmkd::cuda;
  if (which == 0) { FASTMMKD_LAUNCH(mirror, 1, 64, 0, nullptr, out, true); }
  if (which == 1) { FASTMMKD_LAUNCH(mirror, 1, 64, 0, nullptr, out, false); }
  if (which == 2) { FASTMMKD_LAUNCH(leave_early, 1, 64, 0, nullptr); }
  if (which == 3) { FASTMMKD_LAUNCH(leave_a_shuffle, 1, 64, 0, nullptr); }
  if (which == 4) { FASTMMKD_LAUNCH(meet_elsewhere, 1, 64, 0, nullptr); }
  if (which == 5) { FASTMMKD_LAUNCH(write_beyond, 1, 64, 0, nullptr); }
  if (which == 6) { FASTMMKD_LAUNCH(leave_early, 0, 64, 0, nullptr); }
  return cudaGetLastError() == 0 ? "" : emulation_error();
}
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "mistakes.cu").write_text(SOURCE)
    compile_on_host([folder / "mistakes.cu"], folder / "mistakes.so")
    library = ctypes.CDLL(str(folder / "mistakes.so"))
    library.run.restype = ctypes.c_char_p
    return library


def test_a_missing_barrier_shows_in_the_order_of_threads(mistakes) -> None:
    orders = []
    for which in (0, 1):
        found = []
        for order in (False, True):
            mistakes.emulation_reverse(order)
            out = (ctypes.c_float * 64)()
            assert mistakes.run(which, out) == b""
            found.append(list(out))
        orders.append(found)
    with_barrier, without = orders
    assert with_barrier[0] == with_barrier[1] == [63.0 - i for i in range(64)]
    assert without[0] != without[1]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (2, "block 0, thread 0: waits in __syncthreads for threads that do not come"),
        (3, "block 0, thread 32: waits in a shuffle for threads that do not come"),
        (4, "lanes of a warp meet in a ballot and __syncwarp"),
        (5, "a write beyond an object in shared memory"),
        (6, "a launch of 0 blocks of 64 threads with 0 bytes"),
    ],
)
def test_mistakes_are_named(mistakes, which, message) -> None:
    mistakes.emulation_reverse(False)
    out = (ctypes.c_float * 64)()
    assert message in mistakes.run(which, out).decode()
    assert mistakes.run(0, out) == b""
