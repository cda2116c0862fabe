# make demo   install into .venv and answer a wish about a bundled picture
# make test   lint, type check and the whole test suite
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench screenshots ros2 picto calibration clean

demo: $(READY)
	$(BIN)/detgpt detect examples/kitchen.png "I am thirsty" --output out/kitchen.png

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.serving

# The pictures of the web page in docs/images; needs chromium.
screenshots: $(READY)
	$(BIN)/python docs/screenshots.py

# A Python with ROS 2 in build/ros2, for tests/test_ros2.py; needs Python 3.12, cmake and a C++ compiler.
ros2:
	bash tests/ros2_environment.sh

# Train the built-in model anew, from pictograms to weights/picto: hours, on two cores.
picto: $(READY)
	$(BIN)/detgpt-finetune run picto

# After any change of weights/picto: fit its calibration.json anew, and the diagrams in docs/images; minutes.
calibration: $(READY)
	$(BIN)/python -m finetune.picto.splits build/picto --only calibration --scenes 700
	$(BIN)/detgpt calibrate build/picto/calibration -m weights/picto
	$(BIN)/detgpt eval $(addprefix finetune/picto/splits/,seen paraphrases needs style) --calibration build/trust
	cp build/trust/*.png docs/images/

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[demo,dev,eval,finetune,groundingdino,openai,pandas,ray,ros,serve,supervision]"
	touch $(READY)

clean:
	rm -rf .venv build out .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
