"""Commands that describe mkaq: the shipped recipes, the schema of a recipe. They never import torch."""

from mkaq.cli.options import AsJson
from mkaq.console import print_json


def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from mkaq.shipped import shipped_recipes

    listed = [(path.stem, summary, str(path)) for path, summary in shipped_recipes()]
    if as_json:
        print_json([{"name": name, "about": summary, "path": path} for name, summary, path in listed])
        return
    width = max(len(name) for name, _, _ in listed)
    for name, summary, path in listed:
        print(f"{name:<{width}}  {summary}\n{'':<{width}}  {path}")


def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from mkaq.recipe import Recipe

    print_json(Recipe.model_json_schema())
