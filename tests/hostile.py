"""Token texts that other tools have executed, dropped or garbled. Every view must show them literally."""

HOSTILE = [
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "</script><b>",
    "<b>bold</b>",
    "$x^2$",
    "\ud83d",
    "\ufffd",
    "&lt;",
    '" onmouseover="window.ran=1',
    "<a href='https://example.com'>a</a>",
    "%{z}<br>",
    "the",
    "the",
    "a\nb",
    "\u202eabc",
]
