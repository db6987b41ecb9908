# `make train` and `make test` are all that is needed on a fresh machine; the others are named in CONTRIBUTING.md.

PYTHON ?= python3
BIN := .venv/bin
MMMO_DIR ?= ../shared/data/ict_mmmo
CMU_MOSI_DIR ?= ../shared/data/cmu_mosi

.PHONY: train test setup lint types check test-triton test-slow test-hosts real compare compare-synthetic full warm-up study bench cross-compile gpu-check gpu-rehearse gpu-bundle readme matrix fuzz clean

train: data/demo.h5
	$(BIN)/python train.py --config configs/demo.json --out runs/demo --resume

test: lint types check

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 'setuptools<82' wheel
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# The parity wall once more, for the Triton kernels, in Triton's interpreter. CI runs it after `make test`.
test-triton: setup
	TRITON_INTERPRET=1 FASTMMKD_PARITY=triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -W ignore::RuntimeWarning tests/parity

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

# Train on two hosts made of Linux namespaces (root; iproute2, openssh-server and pdsh), and let things go wrong.
test-hosts: setup
	$(BIN)/python -m tests.hosts.trials

# Read files that are nearly right, for so long; what is found stays in tests/fuzz/corpus.
SECONDS ?= 60

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

# The lowest and the highest versions that pyproject.toml claims, in environments of their own; gigabytes.
matrix:
	$(PYTHON) tests/matrix.py

data/demo.h5: | setup
	$(BIN)/fastmmkd data synth --like mosi --fraction 0.25 --seed 1 --out $@

data/synthetic_mosi.h5: | setup
	$(BIN)/fastmmkd data synth --like mosi --fraction 0.5 --seed 1 --out $@

data/fresh_mosi.h5: | setup
	$(BIN)/fastmmkd data synth --like mosi --fraction 0.5 --seed 2 --out $@

# A draw that no setting was chosen on: its seed is the day on which all of them were frozen.
data/dated_mosi.h5: | setup
	$(BIN)/fastmmkd data synth --like mosi --fraction 0.5 --seed 20261127 --out $@

data/ict_mmmo.h5: | setup
	$(BIN)/fastmmkd data import --format mfn $(MMMO_DIR) --resplit 1 --out $@

data/cmu_mosi_%.h5: | setup
	$(BIN)/fastmmkd data import --format mfn $(CMU_MOSI_DIR)/context_$* --out $@

# Real features: every method on ICT-MMMO and on the four folds of CMU-MOSI. What is done is kept: go on by calling again.
FOLDS := data/cmu_mosi_0.h5 data/cmu_mosi_1.h5 data/cmu_mosi_2.h5 data/cmu_mosi_3.h5

real: data/ict_mmmo.h5 $(FOLDS)
	$(BIN)/fastmmkd suite --config configs/*_ict_mmmo.json --out runs/real/ict_mmmo
	$(BIN)/fastmmkd suite --config configs/*_cmu_mosi.json --folds $(FOLDS) --out runs/real/cmu_mosi

# All ten systems on the folds of CMU-MOSI, as `make real` trains them, and on a draw of synthetic MOSI, which needs no files
# (make compare-synthetic). Go on by calling again.
compare: $(FOLDS) compare-synthetic
	$(BIN)/fastmmkd suite --config configs/*_cmu_mosi.json --folds $(FOLDS) --out runs/real/cmu_mosi

compare-synthetic: data/dated_mosi.h5
	$(BIN)/fastmmkd suite --paper mosi --data data/dated_mosi.h5 --seeds 1,2,3 --out runs/compare

# The papers' configs to their end, on synthetic data of the real sets' size: hours. Interrupt it as you like, and call
# it again. DATA and METHODS choose some: make full DATA=mosi METHODS="umdf hrlf".
DATA := mosi iemocap mosei
METHODS := umdf corrkd hrlf

data/full_%.h5: | setup
	$(BIN)/fastmmkd data synth --like $* --fraction 1.0 --seed 1 --out $@

full: $(DATA:%=data/full_%.h5)
	for data in $(DATA); do for method in $(METHODS); do \
		$(BIN)/python train.py --config configs/$${method}_$$data.json --data data/full_$$data.h5 --seeds 1 \
		--out runs/full/$${method}_$$data --resume || exit; done; done

# The same of IEMOCAP, with a warm-up of 200 steps in place of 2000.
warm-up: data/full_iemocap.h5
	for method in $(METHODS); do \
		$(BIN)/python train.py --config configs/$${method}_iemocap.json --data data/full_iemocap.h5 --seeds 1 \
		--set deepspeed.scheduler.params.warmup_num_steps=200 --out runs/warm_up/$${method}_iemocap --resume || exit; done

# The study of docs/ablations.md: every method and its ablations, six seeds, on two draws of the data: an hour on two cores.
# Go on by calling again. METHODS chooses some.
study: data/synthetic_mosi.h5 data/fresh_mosi.h5
	for method in $(METHODS); do \
		$(BIN)/fastmmkd ablate --config configs/study_$$method.json --out runs/study/$$method || exit; \
		$(BIN)/fastmmkd ablate --config configs/study_$$method.json --data data/fresh_mosi.h5 \
		--out runs/study/fresh/$$method || exit; done

# Time the CPU kernels and whole training steps on two threads; parity comes first. A record of each is appended.
# FASTMMKD_ISA=avx2 make bench does it with another instruction set, METHODS="gcnet dmd" make bench with other methods' steps.
STEP := OMP_NUM_THREADS=2 $(BIN)/python -m bench.train_step --record
CONTENDERS := reference,reference + SDPA,ours,as trained,ours x seeds

bench: setup
	mkdir -p build
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest bench --benchmark-enable --benchmark-only \
		--benchmark-json=build/bench.json
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.table build/bench.json --record
	for config in $(METHODS:%=configs/%_mosei.json); do \
		$(STEP) --config $$config --lengths mosei --variants "$(CONTENDERS),reference, cropped,jagged,compile" || exit; \
		$(STEP) --config $$config --lengths full --variants "$(CONTENDERS)" || exit; done
	$(MAKE) readme

# Compile every GPU kernel for every architecture, no GPU needed: registers, spills, shared memory, occupancy.
cross-compile: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cross_compile

# Everything that needs a CUDA device, with the Python that is given: nothing is installed. See docs/gpu.md.
CALL ?= A B

gpu-check:
	$(PYTHON) -m bench.gpu_check $(CALL) $(GPU_CHECK)

# The same sections, smaller, on a CPU.
gpu-rehearse:
	$(PYTHON) -m bench.gpu_check $(CALL) --rehearse $(GPU_CHECK)

# What a GPU machine without a network lacks, made with a Python like that machine's.
gpu-bundle:
	$(PYTHON) -m bench.gpu_bundle

# Write the README's tables from the results under bench/results.
readme: setup
	$(BIN)/python -m bench.report

clean:
	rm -rf .venv runs data build fastmmkd/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
