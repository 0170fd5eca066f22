from genarena.cli import app

app(prog_name="genarena")
