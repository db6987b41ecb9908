// What the emulation found wrong with a launch becomes a RuntimeError.
#pragma once

#include <c10/util/Exception.h>

const char* emulation_error();

#define C10_CUDA_CHECK(launch) TORCH_CHECK((launch) == 0, emulation_error())
