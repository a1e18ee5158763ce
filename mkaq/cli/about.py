"""Commands that describe mkaq: the recipes that ship, the schema of a recipe. They never need torch."""

from mkaq.cli.options import AsJson
from mkaq.console import print_json


def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship."""
    from mkaq.shipped import shipped_recipes

    listed = [(path.stem, told, str(path)) for path, told in shipped_recipes()]
    if as_json:
        print_json([{"name": name, "about": told, "path": path} for name, told, path in listed])
        return
    width = max(len(name) for name, _, _ in listed)
    for name, told, path in listed:
        print(f"{name:<{width}}  {told}\n{'':<{width}}  {path}")


def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    from mkaq.recipe import Recipe

    print_json(Recipe.model_json_schema())
