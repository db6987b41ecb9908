// The CPU kernels of the operations that fastmmkd/ops declares, and what this build is; cuda/binding.cpp has the CUDA
// kernels.
#include <torch/library.h>
#include <torch/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "common/isa.h"
#include "cpu/operations.h"

#ifndef FASTMMKD_FLAGS
#define FASTMMKD_FLAGS ""
#endif

TORCH_LIBRARY_IMPL(fastmmkd, CPU, m) {
  m.impl("cross_attention", fastmmkd::cross_attention);
  m.impl("cross_attention_backward", fastmmkd::cross_attention_backward);
  m.impl("residual_layer_norm", fastmmkd::residual_layer_norm);
  m.impl("residual_layer_norm_backward", fastmmkd::residual_layer_norm_backward);
  m.impl("encoder_layer", fastmmkd::encoder_layer);
  m.impl("encoder_layer_backward", fastmmkd::encoder_layer_backward);
  m.impl("crossmodal_layer", fastmmkd::crossmodal_layer);
  m.impl("crossmodal_layer_backward", fastmmkd::crossmodal_layer_backward);
  m.impl("grouped_linear", fastmmkd::grouped_linear);
  m.impl("grouped_linear_backward", fastmmkd::grouped_linear_backward);
  m.impl("temporal_convolution", fastmmkd::temporal_convolution);
  m.impl("temporal_convolution_backward", fastmmkd::temporal_convolution_backward);
  m.impl("pairwise_contrastive", fastmmkd::pairwise_contrastive);
  m.impl("jsd_mutual_information", fastmmkd::jsd_mutual_information);
  m.impl("gaussian_mmd", fastmmkd::gaussian_mmd);
  m.impl("prototype_similarity", fastmmkd::prototype_similarity);
  m.impl("js_divergence", fastmmkd::js_divergence);
  m.impl("missing_draw", fastmmkd::missing_draw);
}

namespace {

std::map<std::string, std::string> build_info() {
  std::string names;
  for (const std::string& name : fastmmkd::isa_names()) {
    names += (names.empty() ? "" : ", ") + name;
  }
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return {{"compiler", compiler},
          {"flags", FASTMMKD_FLAGS},
          {"torch", TORCH_VERSION},
#ifdef FASTMMKD_CUDA
          {"cuda", FASTMMKD_CUDA},
#endif
          {"instruction sets", names},
          {"instruction set", fastmmkd::isa_name()}};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", build_info);
  m.def("set_isa", fastmmkd::set_isa, "Which instruction set the kernels use; an empty name is the best there is.");
}
