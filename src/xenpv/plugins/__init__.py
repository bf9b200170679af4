"""Other people's tools, looking into a domain through xenpv: each module needs the tool that it is named for."""
