import base64
import re

from PIL import Image

from fastgen.pages import to_html

MARKDOWN = """# A title of
two lines

A paragraph with `x < y*z`, **bold** and [a link](https://example.org).

| a | b\\|c |
|---|---|
| `x` | **1** |

- one
  goes on
- two `**`

```python
# no heading
a < b  # ![no picture](x.png)
```

![there](there.png) ![not there](missing.png)
"""


def test_what_the_pages_use(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "there.png")
    page = to_html(MARKDOWN, tmp_path)
    assert "<title>A title of</title>" in page and "<h1>A title of two lines</h1>" in page
    assert '<code>x &lt; y*z</code>, <b>bold</b> and <a href="https://example.org">a link</a>' in page
    assert "<tr><td>a</td><td>b|c</td></tr><tr><td><code>x</code></td><td><b>1</b></td></tr>" in page
    assert "<li>one\n  goes on\n</li><li>two <code>**</code></li>" in page
    assert "<pre># no heading\na &lt; b  # ![no picture](x.png)</pre>" in page
    inside = re.search(r'<img alt="there" src="data:image/png;base64,([^"]*)">', page)
    assert inside and base64.b64decode(inside[1]) == (tmp_path / "there.png").read_bytes()
    assert '<img alt="not there" src="missing.png">' in page
