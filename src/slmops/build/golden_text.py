"""A long text for golden packs: what a device must not only tokenise as the build did, but find as likely, token by token.

It reaches further into the context than short answers do, so that a wrong rope base shows; it holds digits, spaces, code, a table
and many scripts, so that another pre-tokenizer cuts it differently; and no model is sure of it, so that every token moves when
a head, a page or a matrix is wrong. The same for every model: a text about a model's own task is what it is surest of.

Public domain: the prose is the beginning of *Pride and Prejudice* (Jane Austen, 1813); the rest was written for this purpose.
"""

from __future__ import annotations

#: what the model is asked; it matters little
QUESTION = "Copy this text."
#: what does not fit into the context, or into what the recipe allows, is cut off at the end
TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However \
little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in \
the minds of the surrounding families, that he is considered as the rightful property of some one or other of their daughters.

On 14 March 1879 the ferry Åland left at 07:45 with 1,234 passengers; the fare was £12.50 (3.75 % more than in 1878).  Two \
spaces,\ta tab; it's what they'll say: "I'd rather not!"

    def area(radius):
        total = 0
        for step in range(1, 1001):
            total += 3.14159265 * radius ** 2
        return total

| item   | count |   price |
| apples |    12 |   $3.20 |

Größe, déjà vu, český, Ελλάδα, Москва, 東京, 한국, 🙂; https://example.org/a?id=98765, +44 20 7946 0958.
"""
