# make demo   install into .venv and answer a wish about a bundled picture
# make test   lint, type check and the whole test suite
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench picto clean

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

# Train the built-in model anew, from pictograms to weights/picto: about two hours on two cores.
picto: $(READY)
	$(BIN)/python -m finetune.picto.make

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[demo,dev,eval,finetune,groundingdino,openai,pandas,supervision]"
	touch $(READY)

clean:
	rm -rf .venv build out .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
