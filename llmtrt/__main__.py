from llmtrt.cli.main import script

script()
