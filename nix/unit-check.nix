# systemd has nothing to say against the rendered units, and finds them as closed as promised.
{
  pkgs,
  package,
  rendered,
}:
let
  inherit (pkgs) lib;
  # systemd-analyze's exposure, times ten
  bounds = {
    plain = 11;
    restricted = 13;
  };
  files =
    name: units:
    lib.concatLines (
      lib.mapAttrsToList (unit: text: ''
        install -Dm644 ${builtins.toFile unit text} ${name}/${unit}
      '') units
    );
in
pkgs.runCommand "codex-responses-proxy-unit"
  {
    nativeBuildInputs = [ pkgs.systemd ];
    # the text names it, but has lost the context that would bring it along
    inherit package;
  }
  (
    lib.concatLines (
      lib.mapAttrsToList (name: units: ''
        echo "${name}:"
        ${files name units}
        systemd-analyze verify --man=no --recursive-errors=no ${name}/*
        systemd-analyze security --no-pager --offline=true --threshold=${toString bounds.${name}} \
          ${name}/codex-responses-proxy.service >${name}.txt || { cat ${name}.txt; exit 1; }
        tail -n 1 ${name}.txt
      '') rendered
    )
    + "touch $out\n"
  )
