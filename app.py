"""A page in the browser: a picture, a wish, and what fits it.

    python app.py --model picto --host 127.0.0.1 --port 7860

Needs the extra: pip install 'detgpt[demo]'. The page itself is `detgpt/web/`.
"""

import typer

from detgpt.web import demo

if __name__ == "__main__":
    typer.run(demo)
