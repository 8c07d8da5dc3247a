-- Which drug names are antimicrobials, and which routes do not count.
--
-- A fragment is looked for anywhere in the drug's name, in lower case. Fragments with `reference` are those of
-- mimic-code (MIT licence, commit 8bcbd190ca75, mimic-iv/concepts/medication/antibiotic.sql), ordered here by
-- substance; `sepsis3` and `sepsis3-rise` use only them. The others were added for the Adult Sepsis Event, whose
-- toolkit counts antifungals and antivirals too, and for names outside of the United States.
-- A name that matches several substances gets the first in this order.

CREATE OR REPLACE TABLE antimicrobial_names AS
SELECT row_number() OVER () AS place, substance, reference, unnest(string_split(fragments, '|')) AS fragment
FROM (VALUES
    -- penicillins
    ('piperacillin-tazobactam', true, 'piperacillin|tazobactam|zosyn'),
    ('piperacillin-tazobactam', false, 'tazocin'),
    ('ticarcillin-clavulanate', true, 'timentin'),
    ('amoxicillin', true, 'amoxicill|moxatag|augmentin|clavulanate'),
    ('amoxicillin', false, 'co-amoxiclav'),
    ('ampicillin', true, 'ampicillin|unasyn'),
    ('dicloxacillin', true, 'dicloxacillin'),
    ('flucloxacillin', false, 'flucloxacillin'),
    ('oxacillin', true, 'oxacillin|bactocill'),
    ('nafcillin', true, 'nafcillin'),
    ('methicillin', true, 'methicillin'),
    ('penicillin', true, 'penicillin|pfizerpen|bicillin l-a|pc pen vk'),
    -- cephalosporins
    ('ceftolozane-tazobactam', false, 'ceftolozane|zerbaxa'),
    ('ceftazidime', true, 'ceftazidime|fortaz|tazicef'),
    ('ceftriaxone', true, 'ceftriaxone|rocephin'),
    ('cefepime', true, 'cefepime|maxipime'),
    ('cefazolin', true, 'cefazolin|ancef|kefzol'),
    ('cefotaxime', true, 'cefotaxime|claforan'),
    ('cefotetan', true, 'cefotetan|cefotan'),
    ('cefoxitin', true, 'cefoxitin|mefoxin'),
    ('ceftaroline', true, 'ceftaroline'),
    ('cefuroxime', true, 'cefuroxime|ceftin|zinacef|axetil'),
    ('cephalexin', true, 'cephalexin|keflex|panixine'),
    ('cefaclor', true, 'cefaclor|raniclor'),
    ('cefadroxil', true, 'cefadroxil|duricef'),
    ('cefdinir', true, 'cefdinir|omnicef'),
    ('cefditoren', true, 'cefditoren|spectracef'),
    ('cefpodoxime', true, 'cefpodoxime|vantin'),
    ('cefpirome', true, 'cefpirome'),
    ('cefprozil', true, 'cefprozil'),
    ('ceftibuten', true, 'ceftibuten|cedax'),
    ('cefixime', true, 'suprax'),
    ('cefixime', false, 'cefixime'),
    ('cephalothin', true, 'cephalothin'),
    ('cephapirin', true, 'cephapririn'),
    ('cefiderocol', false, 'cefiderocol'),
    -- carbapenems, monobactams
    ('meropenem', true, 'meropenem'),
    ('imipenem', false, 'imipenem|primaxin'),
    ('ertapenem', false, 'ertapenem|invanz'),
    ('doripenem', false, 'doripenem'),
    ('aztreonam', true, 'aztreonam|azactam|cayston'),
    -- aminoglycosides
    ('amikacin', true, 'amikacin|amikin'),
    ('gentamicin', true, 'gentamicin|garamycin'),
    ('tobramycin', true, 'tobramycin|bethkis'),
    ('kanamycin', true, 'kanamycin'),
    ('neomycin', true, 'neomycin'),
    ('streptomycin', true, 'streptomycin'),
    -- fluoroquinolones
    ('ciprofloxacin', true, 'cipro|proquin'),
    ('levofloxacin', true, 'levofloxacin|levaquin'),
    ('moxifloxacin', true, 'moxifloxacin|avelox'),
    ('norfloxacin', true, 'norfloxacin|noroxin'),
    ('gemifloxacin', true, 'factive'),
    ('ofloxacin', true, 'ofloxacin'),
    -- macrolides, lincosamides
    ('azithromycin', true, 'azithromycin|zithromax'),
    ('clarithromycin', true, 'clarithromycin|biaxin'),
    ('dirithromycin', true, 'dirithromycin'),
    ('erythromycin', true, 'erythromycin|erythrocin|ery-tab|eryped|eryc|pce dispertab|pediazole'),
    ('telithromycin', true, 'ketek'),
    ('clindamycin', true, 'clindamycin|cleocin'),
    ('lincomycin', true, 'lincocin'),
    -- tetracyclines
    ('doxycycline', true, 'doxycy|adoxa|alodox|avidoxy|doryx|monodox|morgidox|nicazel doxy 30|ocudox|oracea|oraxyl'),
    ('doxycycline', true, 'periostat|vibramycin|vibra-tabs'),
    ('minocycline', true, 'minocycline|minocin|dynacin|myrac|solodyn'),
    ('tigecycline', false, 'tigecycline|tygacil'),
    ('tetracycline', true, 'tetracycline|ala-tet'),
    -- glycopeptides, oxazolidinones and others against Gram-positive bacteria
    ('vancomycin', true, 'vancomycin|vancocin'),
    ('telavancin', true, 'vibativ'),
    ('teicoplanin', false, 'teicoplanin'),
    ('dalbavancin', false, 'dalbavancin'),
    ('oritavancin', false, 'oritavancin'),
    ('linezolid', true, 'linezolid|zyvox'),
    ('tedizolid', false, 'tedizolid'),
    ('daptomycin', true, 'cubicin'),
    ('daptomycin', false, 'daptomycin'),
    ('quinupristin-dalfopristin', true, 'synercid'),
    -- sulfonamides, urinary agents, others
    ('trimethoprim-sulfamethoxazole', true, 'sulfamethoxazole|trimethoprim|bactrim|septra|smz-tmp|sulfatrim|primsol'),
    ('trimethoprim-sulfamethoxazole', false, 'co-trimoxazole|cotrimoxazole'),
    ('sulfadiazine', true, 'sulfadiazine'),
    ('sulfisoxazole', true, 'sulfisoxazole'),
    ('metronidazole', true, 'metronidazole|flagyl'),
    ('nitrofurantoin', true, 'nitrofurantoin|macrobid|macrodantin|furadantin'),
    ('fosfomycin', true, 'monurol'),
    ('fosfomycin', false, 'fosfomycin'),
    ('rifampin', true, 'rifampin|rifadin'),
    ('rifampin', false, 'rifampicin'),
    ('chloramphenicol', true, 'chloramphenicol'),
    ('colistin', false, 'colisti|polymyxin b'),
    ('mupirocin', true, 'mupirocin|bactroban'),
    -- antifungals
    ('amphotericin', true, 'amphotericin'),
    ('anidulafungin', true, 'anidulafungin'),
    ('caspofungin', false, 'caspofungin'),
    ('micafungin', false, 'micafungin'),
    ('fluconazole', false, 'fluconazole'),
    ('voriconazole', false, 'voriconazole'),
    ('posaconazole', false, 'posaconazole'),
    ('isavuconazole', false, 'isavuconazo'),
    -- antivirals
    ('acyclovir', false, 'acyclovir|aciclovir'),
    ('ganciclovir', false, 'ganciclovir'),
    ('foscarnet', false, 'foscarnet'),
    ('peramivir', false, 'peramivir'),
    ('oseltamivir', false, 'oseltamivir')
) AS names (substance, reference, fragments);

-- The substance of a drug's name; NULL for a drug that is none of the above.
CREATE OR REPLACE MACRO antimicrobial(name) AS (
    SELECT arg_min(substance, place) FROM antimicrobial_names WHERE contains(lower(name), fragment)
);

-- TRUE where one of mimic-code's own fragments is in the name.
CREATE OR REPLACE MACRO is_reference_antibiotic(name) AS (
    SELECT coalesce(bool_or(reference), false) FROM antimicrobial_names WHERE contains(lower(name), fragment)
);

-- Eye, ear and skin do not count, nor do creams, gels and desensitization (mimic-code); the words in full are for
-- sources that have no abbreviations.
CREATE OR REPLACE MACRO is_topical(name, route) AS
    coalesce(upper(route) IN ('OU', 'OS', 'OD', 'AU', 'AS', 'AD', 'TP'), false)
    OR coalesce(regexp_matches(lower(route), 'ear|eye|topical|ophthalmic|otic|auricular'), false)
    OR regexp_matches(lower(name), 'cream|gel|desensitization|ophth oint');

-- Into a vein or a muscle. NULL for an unknown route.
CREATE OR REPLACE MACRO is_parenteral(route) AS
    regexp_matches(lower(route), '(^|[^a-z])(iv|im|ivpb)([^a-z]|$)|intraven|intramus|infus|inject|parenteral');
