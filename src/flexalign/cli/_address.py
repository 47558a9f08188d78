"""What ``flexalign serve`` says once requests are taken, whatever engine takes them."""

from flexalign.cli.console import print_json, say


def url_of(host: str, port: int, *, scheme: str = "http") -> str:
    """Return where a server's API is."""
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}/v1"


def tell_address(
    url: str,
    model: str,
    lambda_range: tuple[float, float],
    *,
    engine: str = "",
    playground: bool,
    as_json: bool,
) -> None:
    """Say what is served, and print where alone on stdout.

    Args:
        url: Of :func:`url_of`.
        model: What requests call it.
        lambda_range: λ that they may ask for.
        engine: What runs it, as in "on vLLM"; nothing for this process.
        playground: Whether there is a page to try the dial from.
        as_json: Print JSON.
    """
    say(f"serving {model}{engine and f' {engine}'}; stop it with Ctrl-C.")
    if playground:
        say(f"playground: {url.removesuffix('/v1')}/playground")
    if as_json:
        print_json({"url": url, "model": model, "lambda_range": list(lambda_range)})
    else:
        print(url, flush=True)
